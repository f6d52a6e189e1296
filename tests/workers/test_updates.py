"""Updates of actor and discriminator: the same loss and gradient however the batch is cut, against plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import answer_rows, causal_lm, scorer
from tests.workers import updates_on_two_ranks
from tests.workers.updates_setup import ANCHOR, ANSWERS, EOS, LOSSES, PROMPTS, WEIGHTS, batch, settings, update
from verl.batch import student_rows, teacher_response_mask, teacher_rows
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.packing import AnswerRows
from verl.trainer.ppo import shares
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from verl.workers.critic.groups import DistinctAnswers
from verl.workers.updates import MetricSums, build_optimizer, optimizer_step, split_rows

LAST_TOKEN = ["critic.discriminator.pooling=last_token"]


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", ["tokens", "rows", "padded"])
def test_gradient_and_metrics_do_not_depend_on_the_split(loss, split):
    whole, expected = update(loss, settings(loss), batch())
    cut, metrics = update(loss, settings(loss, split), batch())
    assert_same_gradients(gradients(cut), gradients(whole))
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.distributed
def test_gradient_and_metrics_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Two processes with FSDP2 over gloo, two prompts each, against one process with four."""
    torch.multiprocessing.spawn(updates_on_two_ranks.run, args=(2, tmp_path), nprocs=2)
    for loss in LOSSES:
        whole, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        assert_same_gradients(result["gradients"], gradients(whole))
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (loss, name)
        # Two layers and what is around them, once for the whole mini-batch, however many micro-batches it had.
        assert result["reductions"] == 3, loss
    more = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name, _, _ in updates_on_two_ranks.MORE}
    for name, loss, _ in updates_on_two_ranks.MORE:
        whole, expected = update(loss, settings(loss), batch())
        assert_same_gradients(more[name]["gradients"], gradients(whole))
        for metric, value in expected.items():
            assert more[name]["metrics"][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, metric)
    assert more["every"]["reductions"] > 3, "one micro-batch shows nothing"
    assert more["every"]["reductions"] == 3 * more["every-at-once"]["reductions"]
    # Weights that are gathered at once stay so from the first micro-batch to the last.
    assert {more[f"{loss}-at-once"]["gathers"] for loss in ("sft", "gspo", "ranking", "soda")} == {1}
    assert {more[f"{loss}-at-once"]["reductions"] for loss in ("sft", "gspo", "ranking", "soda")} == {1}


def test_sft_loss_and_gradient_equal_hugging_face_cross_entropy():
    """Hugging Face's own loss on the same sequences, labels -100 outside the teacher's tokens."""
    data = batch()
    rows = teacher_rows(data)
    ids = torch.cat([rows.prompts, rows.responses], -1)
    mask = torch.cat([rows.prompt_mask, rows.response_mask], -1)
    answer = torch.cat([torch.zeros_like(rows.prompt_mask), rows.response_mask], -1).bool()
    model = causal_lm()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(~answer, -100))
    output.loss.backward()

    module, metrics = update("sft", settings("sft"), data)
    assert metrics["actor/sft_loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert metrics["actor/teacher_pg_loss"] == metrics["actor/sft_loss"]
    expected = {f"hf.{name}": parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(gradients(module), expected)


@pytest.mark.parametrize("split", ["whole", "tokens", "rows", "padded"])
def test_log_probs_of_the_teachers_answers_equal_hugging_face_cross_entropy(split):
    """At temperature 1, though answers are sampled at 0.7; per row, so neither micro-batches nor ranks matter."""
    data = batch()
    rows, model = teacher_rows(data), causal_lm()
    expected = torch.zeros(rows.responses.shape)
    for row in range(PROMPTS):
        prompt = rows.prompts[row][rows.prompt_mask[row].bool()]
        answer = rows.responses[row][rows.response_mask[row].bool()]
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        expected[row, : len(answer)] = -F.cross_entropy(logits, answer, reduction="none")

    group = settings("gspo", split).actor_rollout_ref
    module = PolicyModel(causal_lm(), group.model.use_remove_padding)
    log_probs = DataParallelPPOActor(group.actor, group.rollout, module).compute_teacher_log_prob(data)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_discriminator_update_equals_the_flat_form():
    """The teacher repeated N times, every pair on its own, Bradley-Terry on the last token."""
    data = batch()
    module = ScoreModel(scorer())
    students, teachers = student_rows(data), teacher_rows(data)
    repeated = teachers.select(torch.arange(PROMPTS).repeat_interleave(ANSWERS))

    def last(rows, without_eos):
        return module(rows).gather(-1, (rows.response_mask.sum(-1) - 1 - without_eos)[:, None])[:, 0]

    # The last teacher's answer was cut, so the EOS of the student's answer (3, 2), the eleventh, is not looked at.
    cut_group = torch.zeros(PROMPTS * ANSWERS, dtype=torch.long)
    cut_group[11] = 1
    loss = -F.logsigmoid(last(repeated, 0) - last(students, cut_group)).mean()
    loss.backward()
    grouped, metrics = update("bradley_terry", settings("bradley_terry", overrides=LAST_TOKEN), data)
    assert metrics["critic/d_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert_same_gradients(gradients(grouped), gradients(module))


def test_values_of_students_and_teachers():
    data = batch()
    config = settings("ranking").critic
    critic = DataParallelPPOCritic(config, ScoreModel(scorer()), None, EOS)
    values = critic.compute_values(data)
    data.meta_info["compute_teacher"] = True
    teacher_values = critic.compute_values(data)
    assert values.shape == (PROMPTS, ANSWERS, 8)
    assert teacher_values.shape == (PROMPTS, 8)
    torch.testing.assert_close(values.flatten(0, 1), ScoreModel(scorer())(student_rows(data)), atol=1e-5, rtol=1e-5)
    # Mean pooling by hand: the sum over real tokens, EOS among them, but not in the group whose teacher was cut.
    scores = critic.compute_scores(data)
    assert scores["student_score_tokens"][0, 0] == 8 and scores["student_score_tokens"][3, 2] == 7
    assert scores["student_scores"][0, 0] == pytest.approx(values[0, 0, :8].mean().item(), abs=1e-6)
    assert scores["student_scores"][3, 2] == pytest.approx(values[3, 2, :7].mean().item(), abs=1e-6)
    mask = teacher_response_mask(data)
    expected = (teacher_values * mask).sum(-1) / mask.sum(-1)
    torch.testing.assert_close(scores["teacher_scores"][:, 0], expected, atol=1e-5, rtol=1e-5)


def test_each_distinct_answer_of_a_group_is_forwarded_once():
    """At most N + 1 sequences a group, not 2 N; two students wrote the same, another wrote what the teacher wrote."""
    seen = []

    def watch(module):
        module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        return module

    update("ranking", settings("ranking"), batch(), wrap=watch)
    assert sum(seen) == PROMPTS * (ANSWERS + 1) - 2


@pytest.mark.parametrize("loss", ["ranking", "bradley_terry", "hinge-adaptive"])
@pytest.mark.parametrize("split", ["whole", "tokens", "rows"])
def test_scores_from_the_updates_own_forward_are_those_before_it(loss, split):
    """With a learning rate that changes the scores; the update is then the same as that of `update_critic`."""
    config = settings(loss, split).critic
    data = batch()
    data.meta_info["mini_batches"] = 1
    before = DataParallelPPOCritic(config, ScoreModel(scorer()), None, EOS).compute_scores(data)

    def critic():
        module = ScoreModel(scorer())
        return DataParallelPPOCritic(config, module, torch.optim.AdamW(module.parameters(), lr=1e-2), EOS)

    fused, plain = critic(), critic()
    scores, metrics = fused.score_and_update(data)
    assert scores.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(scores[name], value, atol=1e-5, rtol=1e-5)
    # Without the update: the same numbers, and no weight moves.
    evaluated, values = plain.score_and_evaluate(data)
    assert values == pytest.approx({name: value for name, value in metrics.items() if name != "critic/grad_norm"})
    for name, value in before.items():
        torch.testing.assert_close(evaluated[name], value, atol=1e-5, rtol=1e-5)
    expected = plain.update_critic(data)
    assert metrics == pytest.approx(expected)
    for ours, theirs in zip(fused.critic_module.parameters(), plain.critic_module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(fused.compute_scores(data)["student_scores"], before["student_scores"], atol=1e-3)


def test_adaptive_temperature_follows_the_mean_difference_of_the_mini_batch():
    data = batch()
    config = settings("hinge-adaptive", "rows").critic
    critic = DataParallelPPOCritic(config, ScoreModel(scorer()), None, EOS)
    scores = critic.compute_scores(data)
    d = scores["teacher_scores"] - scores["student_scores"]
    temperature = 0.5 + 0.5 * abs(d.mean().item())
    assert 0.5 < temperature < 3.0, "at a limit it would not show the mean"
    _, metrics = update("hinge-adaptive", settings("hinge-adaptive", "rows"), data)
    assert metrics["critic/temperature"] == pytest.approx(temperature, abs=1e-6)
    ranking = -F.logsigmoid((d / temperature).clamp(-10, 10)).mean().item()
    assert metrics["critic/ranking_loss"] == pytest.approx(ranking, abs=1e-6)
    lower = F.relu(1 - d).mean().item()
    assert metrics["critic/d_loss"] == pytest.approx(lower + 0.5 * ranking, abs=1e-5)


def test_several_mini_batches_and_epochs_step_each_time():
    steps = []

    class CountingActor(torch.optim.AdamW):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    config = settings("sft")
    object.__setattr__(config.actor_rollout_ref.actor, "ppo_mini_batch_size", 2)
    object.__setattr__(config.actor_rollout_ref.actor, "ppo_epochs", 3)
    module = PolicyModel(causal_lm())
    group = config.actor_rollout_ref
    DataParallelPPOActor(group.actor, group.rollout, module, CountingActor(module.parameters(), lr=1e-3)).update_policy(
        batch()
    )
    assert len(steps) == 2 * 3


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing():
    layer = torch.nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    layer(torch.tensor([[float("inf"), 1.0]])).sum().backward()
    with pytest.raises(FloatingPointError, match="update was not applied"):
        optimizer_step(layer, torch.optim.SGD(layer.parameters(), lr=1.0), max_norm=1.0)
    assert torch.equal(layer.weight, before)


def test_clipping_scales_the_gradient_and_reports_the_norm_before():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])  # norm 5
    before = layer.weight.detach().clone()
    norm = optimizer_step(layer, torch.optim.SGD(layer.parameters(), lr=1.0), max_norm=1.0)
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(before - layer.weight, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=1e-5)


def test_metric_sums_weigh_parts_by_what_they_count():
    sums = MetricSums()
    sums.add({"a": 1.0}, 3.0)
    sums.add({"a": torch.tensor(5.0), "b": 2.0}, 1.0)
    assert sums.means() == {"a": 2.0, "b": 2.0}  # (1 * 3 + 5 * 1) / 4


def test_schedules_follow_the_settings():
    config = settings("sft").actor_rollout_ref.actor.optim
    changes = {"lr": 1.0, "lr_scheduler_type": "cosine", "lr_warmup_steps_ratio": 0.2, "total_training_steps": -1}
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    layer = torch.nn.Linear(1, 1)
    optimizer, schedule = build_optimizer(layer, config, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    # Two warmup steps, 1/2 and 1, then half a cosine over eight: 1 at its start, 1/2 in its middle.
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.5)


def rows_of(prompts: list[int], answer_lengths: list[int]) -> AnswerRows:
    """Answers to the given prompts, each of four tokens."""
    rows = answer_rows([4] * len(prompts), answer_lengths)
    first = [prompts.index(prompt) for prompt in prompts]
    return AnswerRows(rows.prompts[first], rows.prompt_mask, rows.responses, rows.response_mask)


def test_states_made_beforehand_are_those_that_adamw_makes_itself():
    config = settings("sft").actor_rollout_ref.actor.optim
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, _ = build_optimizer(ours, config, total_steps=2)
    expected = torch.optim.AdamW(
        theirs.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    assert len(optimizer.state) == 2
    for scale in (1.0, -3.0):
        for layer, stepped in ((ours, optimizer), (theirs, expected)):
            stepped.zero_grad()
            (layer(torch.tensor([1.0, 2.0, 3.0])) * scale).sum().backward()
            stepped.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert optimizer.state[mine].keys() == expected.state[other].keys()
        for name, value in expected.state[other].items():
            assert torch.equal(optimizer.state[mine][name], value) and optimizer.state[mine][name].dtype == value.dtype


def test_a_prompt_counts_once_where_it_is_computed_once():
    """Prompts of 4 tokens; answers of 2, 3, 1 to the first, of 5, 2 to the second, of 6 to the last."""
    rows = rows_of([0, 0, 0, 1, 1, 2], [2, 3, 1, 5, 2, 6])
    assert rows.lengths() == [6, 7, 5, 9, 6, 10] and rows.shared_prompts() == [0, 4, 4, 0, 4, 0]
    packed, padded = (PolicyModel(causal_lm(), remove_padding) for remove_padding in (True, False))
    # 4 + 2 + 3 + 1, 4 + 5 + 2 and 4 + 6.
    assert split_rows(rows, packed, True, 31, None) == [[0, 1, 2, 3, 4, 5]]
    assert split_rows(rows, packed, True, 11, None) == [[3, 4], [0, 1, 2], [5]]
    # Of padded rows each has a prompt of its own: 43 tokens.
    assert split_rows(rows, padded, True, 43, None) == [[0, 1, 2, 3, 4, 5]]
    cut = split_rows(rows, padded, True, 31, None)
    assert len(cut) == 2 and max(sum(rows.lengths()[row] for row in part) for part in cut) <= 31
    assert split_rows(rows, packed, False, 0, 4) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(("share_prompts", "expected"), [(True, [18, 21, 16, 18]), (False, [33, 24, 34, 24])])
def test_tokens_of_a_group(share_prompts, expected):
    """Prompts of 5, 1, 9, 3 tokens, teachers of 2, 7, 1, 6, and students of [7, 1, 3], [2, 7, 4], [5, 5, 1], [6, 2, 7]
    without their EOS, of which two are equal in the third group, and the first is the teacher's in the last."""
    assert DistinctAnswers.of(batch(), EOS, exclude_eos=True).lengths(share_prompts) == expected


def test_tokens_of_a_group_with_eos():
    """As above, and one EOS more for each answer with one, but none where the teacher's answer was cut."""
    assert DistinctAnswers.of(batch(), EOS, exclude_eos=False).lengths(True) == [20, 22, 17, 18]


def test_how_an_answer_is_closed_tells_the_discriminator_nothing():
    """A student that wrote what the teacher did and closed it with another EOS has the teacher's score, to the last
    bit; and all scores are those of a batch in which every answer is closed with the tokenizer's."""
    other = 77
    config = settings("ranking", overrides=LAST_TOKEN).critic
    critic = DataParallelPPOCritic(config, ScoreModel(scorer()), None, (EOS, other))
    data, plain = batch(), batch()
    for tensors in (data.batch, plain.batch):
        # The teacher's second answer has all 8 tokens.
        tensors["responses"][1, 0] = tensors["teacher_response"][1]
        tensors["response_mask"][1, 0] = 1
    data.batch["responses"][0, 0, -1] = data.batch["responses"][1, 0, -1] = other
    scores = critic.compute_scores(data)
    assert scores["student_scores"][1, 0] == scores["teacher_scores"][1, 0]
    for name, expected in critic.compute_scores(plain).items():
        assert torch.equal(scores[name], expected), name
    assert torch.equal(critic.compute_values(data), critic.compute_values(plain))
    # To one that knows of no other EOS it is a word.
    blind = DataParallelPPOCritic(config, ScoreModel(scorer()), None, EOS).compute_scores(data)
    assert not torch.allclose(blind["student_scores"][:2, 0], scores["student_scores"][:2, 0], atol=1e-3)


@pytest.mark.parametrize("loss", ["gspo-anchor", "ppo-anchor-first-look"])
def test_an_anchored_update_has_the_sum_of_two_gradients(loss):
    """The policy loss's, at the sampling temperature, and ANCHOR times that of the teacher's cross-entropy at 1."""
    anchored, metrics = update(loss, settings(loss), batch())
    data = batch()
    data.batch.pop("rollout_is_weights")
    if loss.endswith("first-look"):
        data.batch.pop("old_log_probs")
    group = settings(loss).actor_rollout_ref
    policy = PolicyModel(causal_lm())
    actor = DataParallelPPOActor(group.actor, group.rollout, policy, torch.optim.SGD(policy.parameters(), lr=0.0))
    expected = actor.update_policy(data)
    sft, sft_metrics = update("sft", settings("sft"), batch())
    total = {name: gradients(policy)[name] + ANCHOR * gradient for name, gradient in gradients(sft).items()}
    assert_same_gradients(gradients(anchored), total)
    assert metrics["actor/sft_anchor_loss"] == pytest.approx(sft_metrics["actor/sft_loss"], rel=1e-6)
    assert metrics["actor/sft_anchor_coef"] == pytest.approx(ANCHOR)
    for name, value in expected.items():
        if name != "actor/grad_norm":
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("loss", ["gspo", "ppo"])
def test_importance_weights_scale_the_policy_loss_of_each_token(loss):
    """As advantages would: the losses are proportional to them. The KL loss is what it was."""
    group = settings(loss).actor_rollout_ref
    both = []
    for key, value in (("rollout_is_weights", WEIGHTS), ("advantages", batch().batch["advantages"] * WEIGHTS)):
        data = batch()
        data.batch.pop("rollout_is_weights")
        data.batch[key] = value
        policy = PolicyModel(causal_lm())
        actor = DataParallelPPOActor(group.actor, group.rollout, policy, torch.optim.SGD(policy.parameters(), lr=0.0))
        metrics = actor.update_policy(data)
        both.append((gradients(policy), metrics))
    (weighted, ours), (scaled, theirs) = both
    assert_same_gradients(weighted, scaled)
    for name in ("actor/pg_loss", "actor/kl_loss", "actor/ppo_kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_an_anchored_update_shares_the_prompts():
    """The 70 tokens of `test_a_shared_prompt_is_forwarded_once_in_the_update...`, and the teachers' 19."""
    seen = []

    def watch(module):
        module.hf.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
        return module

    update("gspo-anchor", settings("gspo-anchor"), batch(), wrap=watch)
    assert seen == [18 + 52 + 19]


def test_shares_count_a_prompt_once():
    """Prompts of 5, 1, 9, 3 tokens, teachers of 3, 8, 2, 6, students of 12, 13, 11, 16 in all."""
    assert shares._tokens(batch()) == [20, 22, 22, 25]
    assert shares._tokens(batch().select(["attention_mask", "teacher_attention_mask"])) == [8, 9, 11, 9]


def test_a_shared_prompt_is_forwarded_once_in_the_update_and_in_the_log_prob_pass():
    """Of the batch's 12 answers and 4 prompts of 5, 1, 9 and 3 tokens: 18 + 52 tokens."""
    data, seen = batch(), []
    config = settings("gspo")
    module = PolicyModel(causal_lm())
    module.hf.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    actor = DataParallelPPOActor(
        config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, module, torch.optim.SGD(module.parameters())
    )
    actor.compute_log_prob(data)
    actor.update_policy(data)
    assert int(data.batch["response_mask"].sum()) == 52
    assert seen == [18 + 52] * 2


def test_a_shared_prompt_is_forwarded_once_by_the_discriminator():
    """The students' 70 tokens as above; in the update the 77 of `test_tokens_of_a_group`, the teachers' among them."""
    data, seen = batch(), []
    module = ScoreModel(scorer())
    module.hf.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    critic = DataParallelPPOCritic(settings("ranking").critic, module, torch.optim.SGD(module.parameters()), EOS)
    critic.compute_values(data)
    data.meta_info["mini_batches"] = 1
    critic.update_critic(data)
    assert seen == [70, 77]
