"""Settings of the adversarial stages, each in a short run of its own on one rank, against what it must change."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial

import pytest
import torch

from tests.e2e.metric_names import DISCRIMINATOR_METRICS, POLICY_METRICS
from tests.e2e.running import read_metrics
from verl.model_merger import merge
from verl.models.loading import load_model
from verl.trainer.ppo.head_start import DiscriminatorCouldNotLearn
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = pytest.mark.e2e


def actor_of(run, step):
    return read_full_tensors(run / f"global_step_{step}" / "actor" / "model")


@pytest.fixture(scope="module")
def plain(run):
    return read_metrics(run("plain"))


def test_one_mini_batch_and_one_epoch_have_no_kl_to_the_old_policy(plain):
    assert plain[1].keys() >= DISCRIMINATOR_METRICS | POLICY_METRICS
    assert abs(plain[1]["actor/ppo_kl"]) < 1e-6
    assert plain[1]["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize(
    "reuse", ["actor_rollout_ref.actor.ppo_epochs=3", "actor_rollout_ref.actor.ppo_mini_batch_size=2"]
)
def test_a_reused_batch_moves_away_from_the_old_policy(run, reuse):
    metrics = read_metrics(run(reuse.split("=")[0], reuse, "critic.ppo_mini_batch_size=4"))
    assert abs(metrics[1]["actor/ppo_kl"]) > 1e-5


def test_warmup_by_sft_trains_both_from_the_first_step(run, folder):
    """The actor by cross-entropy on the teacher, the discriminator against its samples; no policy loss."""
    sft = run("sft", "trainer.warmup_use_sft=True", "trainer.critic_warmup=10", "trainer.save_freq=1", steps=12)
    metrics = read_metrics(sft)
    assert metrics[0].keys() >= {"actor/sft_loss", "critic/d_loss", "critic/d_acc", "critic/length_ratio"}
    assert not {"actor/pg_loss", "critic/advantages/mean", "timing_s/ref"} & metrics[0].keys()
    assert metrics[11]["actor/sft_loss"] < metrics[0]["actor/sft_loss"] - 0.1
    base = load_model(folder / "base", "policy").state_dict()
    first = actor_of(sft, 1)
    assert any(not torch.equal(first[name], base[name]) for name in first), "critic_warmup must not freeze SFT"
    gaps = [data["training/rollout_probs_diff_max"] for data in metrics.values()]
    assert max(gaps) < 1e-4


def test_a_task_reward_is_mixed_in_and_logged_on_its_own(run, plain, folder):
    (folder / "mine.py").write_text("def length(prompt, answer, teacher):\n    return float(len(answer.encode()))\n")
    where = (f"custom_reward_function.path={folder}/mine.py", "custom_reward_function.name=length")
    rollouts = folder / "task_rollouts"
    metrics = read_metrics(
        run("task", *where, "algorithm.task_reward_weight=3", f"trainer.rollout_data_dir={rollouts}")
    )
    answers = [json.loads(line)["answers"] for line in (rollouts / "0.jsonl").read_text().splitlines()]
    lengths = [len(answer.encode()) for group in answers for answer in group]
    task = sum(lengths) / len(lengths)
    assert metrics[0]["critic/task_reward/mean"] == pytest.approx(task)
    assert metrics[0]["critic/task_reward/max"] == max(lengths)
    assert metrics[0]["critic/student_score_mean"] == pytest.approx(plain[0]["critic/student_score_mean"])
    expected = metrics[0]["critic/student_score_mean"] + 3 * task
    assert metrics[0]["critic/rewards/mean"] == pytest.approx(expected, rel=1e-5)
    # With weight 0 it is looked at only: everything else is as in the plain run.
    watched = read_metrics(run("watched", *where))
    assert watched[0]["critic/task_reward/mean"] == pytest.approx(task)
    same = [name for name in plain[2] if not name.startswith(("timing", "perf/"))]
    assert {name: watched[2][name] for name in same} == {name: plain[2][name] for name in same}


def test_a_task_reward_that_fails_ends_the_run_with_its_row(run, folder):
    (folder / "bad.py").write_text("def compute_score(prompt, answer, teacher):\n    raise LookupError('no key')\n")
    with pytest.raises(RuntimeError, match=r"bad.py:compute_score, data row \d+, answer 0: raised LookupError: no key"):
        run("bad", f"custom_reward_function.path={folder}/bad.py")


def test_a_loss_of_the_users_own_trains_the_discriminator(run, folder):
    (folder / "own.py").write_text(
        "def squared(scores, target):\n"
        "    loss = (scores.difference - target).square().mean()\n"
        "    return loss, {'critic/squared': loss}\n"
    )
    own = (f"critic.discriminator.loss={folder}/own.py:squared", "critic.discriminator.custom={target: 2.0}")
    metrics = read_metrics(run("own", *own, steps=6))
    assert metrics[0]["critic/squared"] == metrics[0]["critic/d_loss"] > 0
    assert metrics[5]["critic/squared"] < metrics[0]["critic/squared"]


def test_kl_in_the_reward_with_both_controllers(run):
    """Fixed keeps its coefficient; adaptive moves it by 1 + clip(kl / target - 1, +-0.2) * answers / horizon, from the
    first step on in which the actor trains."""
    kl = ("algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.5", "actor_rollout_ref.actor.optim.lr=1e-2")
    fixed = read_metrics(run("kl_fixed", *kl))
    assert [fixed[step]["actor/reward_kl_penalty_coeff"] for step in range(3)] == [0.5] * 3
    # Before the first update actor and reference are the same; then the actor has moved.
    assert abs(fixed[0]["actor/reward_kl_penalty"]) < 1e-6
    assert abs(fixed[2]["actor/reward_kl_penalty"]) > 1e-4
    difference = fixed[2]["critic/score/mean"] - fixed[2]["critic/rewards/mean"]
    assert abs(difference) > 1e-5, "the penalty must be in the reward"

    adaptive = read_metrics(run("kl_adaptive", *kl, "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=60"))
    # The actor is frozen in step 0. Step 1 has KL 0 still, so the error is clipped to -0.2; 12 answers of 60.
    assert adaptive[1]["actor/reward_kl_penalty_coeff"] == 0.5
    assert adaptive[2]["actor/reward_kl_penalty_coeff"] == pytest.approx(0.5 * (1 - 0.2 * 12 / 60))


def test_advantages_without_the_standard_deviation(run, folder):
    """Then an advantage is the score less its group's mean; with it, at most (n - 1) / sqrt(n) = 1.15 for n = 3."""
    rollouts = folder / "bare_rollouts"
    dump = f"trainer.rollout_data_dir={rollouts}"
    bare = read_metrics(run("bare", dump, "algorithm.norm_adv_by_std_in_grpo=False"))
    groups = [json.loads(line)["scores"] for line in (rollouts / "0.jsonl").read_text().splitlines()]
    advantages = [score - sum(scores) / 3 for scores in groups for score in scores]
    assert all(abs(torch.tensor(scores).std() - 1) > 0.1 for scores in groups), "divided by 1 they would look the same"
    assert bare[0]["critic/advantages/max"] == pytest.approx(max(advantages), abs=1e-5)
    assert bare[0]["critic/advantages/min"] == pytest.approx(min(advantages), abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_entropy_bonus_raises_the_entropy(run, sign):
    """With a coefficient that drowns the policy loss; a negative one lowers it."""
    bonus = (f"actor_rollout_ref.actor.entropy_coeff={sign * 10}", "actor_rollout_ref.actor.optim.lr=1e-3")
    entropy = partial(dict.__getitem__, read_metrics(run(f"entropy{sign}", *bonus, steps=6)))
    assert sign * (entropy(5)["actor/entropy"] - entropy(1)["actor/entropy"]) > 0.01


def test_held_out_answers_survive_a_restart_only_with_their_prompts(run, folder, caplog):
    """The fixed answers of the first run are the second one's; asked about other prompts, it says what it does."""
    held_out = ("trainer.test_freq=1", "trainer.val_before_train=True", "critic.held_out_prompts=3")
    first = read_metrics(run("restart", *held_out, "trainer.save_freq=1", steps=2))
    again = read_metrics(run("restart", *held_out, steps=3))
    assert again[2]["val/critic/fixed/teacher_score_mean"] == first[2]["val/critic/fixed/teacher_score_mean"]
    assert again[2]["val/critic/fixed/student_score_mean"] == first[2]["val/critic/fixed/student_score_mean"]
    assert "no stored answers" not in caplog.text
    run("restart", *held_out, "critic.held_out_prompts=2", steps=4)
    assert "no stored answers to these 2 prompts" in caplog.text


# ---- the discriminator's head start

AUTO = (
    "trainer.critic_warmup=auto",
    "critic.head_start.check_every=2",
    "critic.head_start.accuracy=0.7",
    "trainer.save_freq=1",
)


def test_the_actor_waits_until_held_out_pairs_are_told_apart(run, folder):
    auto = run("auto", *AUTO, steps=10)
    metrics = read_metrics(auto)
    checked = [step for step, data in metrics.items() if "critic/head_start/d_acc" in data]
    trained = [step for step, data in metrics.items() if "actor/pg_loss" in data]
    # Two checks in a row passed before the first step that trains the actor; none is made after.
    assert trained and trained == list(range(trained[0], 10)) and checked[-1] == trained[0] >= 4
    passed = [metrics[step]["critic/head_start/d_acc"] >= 0.7 for step in checked]
    assert passed[-2:] == [True, True]
    base = load_model(folder / "base", "policy").state_dict()
    frozen = actor_of(auto, trained[0])
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen.items())

    # Resumed between the two checks, it is the same run.
    middle = trained[0] - 1
    resumed = folder / "runs" / "auto_resumed"
    resumed.mkdir()
    shutil.copytree(auto / f"global_step_{middle}", resumed / f"global_step_{middle}")
    (resumed / "latest_checkpointed_iteration.txt").write_text(str(middle))
    run("auto_resumed", *AUTO, steps=10)
    for file in ("trainer_state.json", "actor/extra_state.json"):
        assert (auto / "global_step_10" / file).read_text() == (resumed / "global_step_10" / file).read_text()
    expected = actor_of(auto, 10)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actor_of(resumed, 10).items())


def test_a_head_start_without_learning_ends_the_run_and_can_go_on(run, folder):
    with pytest.raises(DiscriminatorCouldNotLearn, match=r"after 4 steps of head start .* critic\.optim\.lr=0\.0"):
        run("blind", *AUTO, "critic.optim.lr=0", "critic.head_start.max_steps=4", "trainer.save_freq=-1", steps=10)
    assert (folder / "runs" / "blind" / "latest_checkpointed_iteration.txt").read_text() == "4"
    metrics = read_metrics(run("blind", *AUTO, steps=10))
    assert sorted(metrics) == list(range(10)) and "actor/pg_loss" in metrics[9]


def test_a_critic_that_cannot_tell_is_named_before_the_first_step(run, folder, caplog):
    """A critic of no step's learning is taken for a warmed-up one by its folder alone."""
    critic = run("fresh", "critic.optim.lr=0", "trainer.save_freq=1", steps=1) / "global_step_1" / "critic"
    validated = ("trainer.val_before_train=True", f"critic.model.path={critic}", "trainer.critic_warmup=0")
    with caplog.at_level(logging.WARNING):
        run("unwarned", *validated, "trainer.val_before_train=False", steps=1)
        assert "may be guessing" not in caplog.text, "nothing is held out in a run that does not validate"
        run("warned", *validated, steps=1)
    assert "may be guessing" in caplog.text


def test_the_teachers_answers_can_stand_beside_the_groups(run, plain):
    anchored = ("actor_rollout_ref.actor.sft_anchor_coef=0.7", "actor_rollout_ref.actor.sft_anchor_end_coef=0.1")
    metrics = read_metrics(run("anchor", *anchored))
    # Steps 0 (frozen), 1, 2 of 3: the weight falls linearly from .7 to .1 over the run, and is not the default's.
    assert "actor/sft_anchor_loss" not in metrics[0]
    assert [metrics[step]["actor/sft_anchor_coef"] for step in (1, 2)] == [pytest.approx(0.4), pytest.approx(0.1)]
    assert metrics[1]["actor/sft_anchor_loss"] > 0
    assert metrics[1]["actor/pg_loss"] == pytest.approx(plain[1]["actor/pg_loss"], abs=1e-6)
    assert metrics[1]["actor/grad_norm"] != pytest.approx(plain[1]["actor/grad_norm"], rel=1e-3)


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(run, folder, tmp_path):
    """Through checks, training, checkpoint and merging; its files come out as they went in."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        (tmp_path / name).write_bytes((folder / "base" / name).read_bytes())
    done = run("alone", f"actor_rollout_ref.model.tokenizer_path={tmp_path}", "trainer.save_freq=1", steps=1)
    merged = merge(done / "global_step_1" / "actor", tmp_path / "merged")
    assert all((merged / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
