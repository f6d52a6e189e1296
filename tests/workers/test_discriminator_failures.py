"""The discriminator's failures, each brought about on purpose, with the metric that shows it.

One fixed batch, a tiny discriminator and its real update; what each failure looks like in a run is in the health table
of the documentation. `tests/e2e/test_failures.py` has those that take a student too.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForTokenClassification

from tests.tiny import SIZES, answer_rows, scorer
from tests.workers.updates_setup import EOS, batch
from verl.models.answer_models import ScoreModel
from verl.protocol import DataProto
from verl.trainer.config import compose_config
from verl.trainer.ppo.core_algos import PairScores, get_discriminator_loss_fn
from verl.trainer.ppo.metric_utils import compute_discriminator_metrics
from verl.workers.critic.dp_critic import DataParallelPPOCritic

REQUIRED = ("data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x", "stage=gad")
RANKING = "critic.discriminator.loss=ranking"


def critic(*overrides: str, lr: float) -> DataParallelPPOCritic:
    config = compose_config([*REQUIRED, *overrides]).critic
    module = ScoreModel(scorer())
    return DataParallelPPOCritic(config, module, torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0), EOS)


def different() -> DataProto:
    """The fixed batch without students that repeat each other or the teacher."""
    data = batch()
    data.batch["responses"][2, 1, 0] += 1
    data.batch["responses"][3, 0, 0] += 1
    return data


def train(discriminator: DataParallelPPOCritic, data: DataProto, steps: int) -> list[dict[str, float]]:
    """Metrics of each step on the same data: the update's, and those of the scores before it."""
    return [step(discriminator, data) for _ in range(steps)]


def step(discriminator: DataParallelPPOCritic, data: DataProto) -> dict[str, float]:
    data.meta_info["mini_batches"] = 1
    scores, metrics = discriminator.score_and_update(data)
    scored = DataProto(data.batch.clone()).union(DataProto.from_dict(scores))
    return metrics | compute_discriminator_metrics(scored)


def random_tokens(data: DataProto, seed: int) -> DataProto:
    """The same lengths with other answers, which say nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("responses", "teacher_response"):
        data.batch[name] = torch.randint(2, 200, data.batch[name].shape, generator=generator)
    return data


@pytest.mark.parametrize("pooling", ["last_token", "mean", "sum"])
@pytest.mark.parametrize("exclude_eos", [True, False])
def test_equal_text_gets_equal_scores_whatever_is_around_it(pooling, exclude_eos):
    """The teacher's tokens as a student's answer, in wider padding, beside other answers, and cut at another length."""
    data = batch()
    teacher, mask = data.batch["teacher_response"], data.batch["teacher_attention_mask"][:, -8:]
    # The second prompt's teacher fills all 8 tokens and ends with EOS.
    teacher[1, -1] = EOS
    data.batch["responses"][:, 2], data.batch["response_mask"][:, 2] = teacher, mask
    # Padding is never looked at: fill the students' with anything.
    noise = torch.randint_like(data.batch["responses"], 2, 200)
    padded = data.batch["response_mask"] == 0
    data.batch["responses"] = torch.where(padded, noise, data.batch["responses"])
    settings_ = (f"critic.discriminator.pooling={pooling}", f"critic.discriminator.exclude_eos={exclude_eos}")
    for budget in (20, 10000):
        scores = critic(*settings_, f"critic.ppo_max_token_len_per_gpu={max(budget, 3584)}", lr=0.0).compute_scores(
            data
        )
        assert torch.equal(scores["student_scores"][:, 2:], scores["teacher_scores"])
        others = scores["student_scores"][:2, :2] - scores["teacher_scores"][:2]
        assert (others.abs() > 1e-3).all()
    if exclude_eos:
        # The same answer cut before its EOS has the same scored tokens.
        data.batch["response_mask"][1, 2, -1] = 0
        scores = critic(*settings_, lr=0.0).compute_scores(data)
        assert scores["student_scores"][1, 2] == scores["teacher_scores"][1, 0]


def gradient_of_a_part(constants: dict[str, float], tokens: int) -> float:
    """Norm of the gradient of `ranking` with the given constants, at a fresh head, on a pair of answers so long."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES | {"max_position_embeddings": 2048}, num_labels=1, classifier_dropout=0.0)
    module = ScoreModel(Qwen2ForTokenClassification(config))
    module.hf.score.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    rows = answer_rows([4, 4], [tokens, tokens])
    values = module(rows)
    mask = rows.response_mask
    scores = PairScores.pool(values[:1], values[1:], mask[:1], mask[1:], "mean")
    get_discriminator_loss_fn("ranking").fn(scores, **constants)[0].backward()
    return torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9).item()


@pytest.mark.parametrize("tokens", [20, 200, 1500])
@pytest.mark.parametrize("stage", ["warmup", "gad", "gad_short"])
def test_the_regulariser_leaves_the_ranking_its_gradient(stage, tokens):
    """In the first step, with every default: not more than ten times the ranking's, whatever the answers' length."""
    constants = compose_config([*REQUIRED, f"stage={stage}"]).critic.discriminator.ranking.__dict__
    ranking = gradient_of_a_part({**constants, "reg_coef": 0.0, "diff_coef": 0.0}, tokens)
    regulariser = gradient_of_a_part({**constants, "ranking_coef": 0.0, "diff_coef": 0.0}, tokens)
    assert regulariser < 10 * ranking
    on_sums = gradient_of_a_part({**constants, "ranking_coef": 0.0, "diff_coef": 0.0, "reg_on": "raw"}, tokens)
    if tokens >= 200:
        assert on_sums > 10 * ranking, "the form that grows with length, which this test is about"


def test_nothing_to_tell_apart():
    """Every student wrote what the teacher wrote: accuracy 0, difference 0, loss log 2, and it cannot learn."""
    data = batch()
    data.batch["responses"] = data.batch["teacher_response"].unsqueeze(1).expand(-1, 3, -1).contiguous()
    mask = data.batch["teacher_attention_mask"][:, -8:]
    data.batch["response_mask"] = mask.unsqueeze(1).expand(-1, 3, -1).contiguous()
    first, *_, last = train(critic(lr=1e-2), data, 5)
    for metrics in (first, last):
        assert metrics["critic/d_acc"] == metrics["critic/score_diff"] == 0.0
        assert metrics["critic/ranking_loss"] == pytest.approx(math.log(2))
        assert metrics["critic/zero_std_group_frac"] == 1.0
        assert metrics["critic/grad_norm"] < 1e-6


def test_too_strong_a_discriminator_knows_the_batch_by_heart():
    """A large learning rate on few answers: accuracy 1 within steps, and the ranking loss has no gradient left."""
    calm = train(critic("critic.discriminator.loss=bradley_terry", lr=1e-5), different(), 40)
    strong = train(critic("critic.discriminator.loss=bradley_terry", lr=1e-2), different(), 40)
    assert calm[-1]["critic/d_acc"] < 0.9
    assert strong[-1]["critic/d_acc"] == 1.0
    assert strong[-1]["critic/ranking_loss"] < 0.01
    assert strong[-1]["critic/grad_norm"] < 0.1 < calm[-1]["critic/grad_norm"]


def test_a_hinge_without_an_upper_bound_runs_away():
    """V1 drives the difference far beyond V2's limit of 5, on the same answers with the same settings."""
    open_ended = train(critic("critic.discriminator.loss=hinge", lr=1e-2), different(), 150)
    bounded = train(critic("critic.discriminator.loss=two_sided_hinge", lr=1e-2), different(), 150)
    assert open_ended[-1]["critic/score_diff"] > 7
    assert (
        open_ended[-1]["critic/score_diff"] > open_ended[75]["critic/score_diff"] > open_ended[40]["critic/score_diff"]
    )
    assert max(step["critic/score_diff"] for step in bounded[40:]) < 5.5
    assert "critic/hinge_loss_upper" in bounded[-1]


def test_without_its_brake_the_ranking_loss_grows_over_confident():
    free = (RANKING, "critic.discriminator.ranking.reg_coef=0")
    unbraked = train(critic(*free, "critic.discriminator.ranking.diff_coef=0", lr=1e-2), different(), 60)
    braked = train(critic(*free, lr=1e-2), different(), 60)
    assert unbraked[-1]["critic/diff_penalty"] > 1.0
    assert braked[-1]["critic/diff_penalty"] < 0.1


def test_a_difference_beyond_the_clamp_has_no_gradient():
    """Students 21 above the teacher at temperature 1: clamped, the ranking loss sits at its worst and cannot move."""
    data = different()
    settings_ = (RANKING, "critic.discriminator.ranking.reg_coef=0", "critic.discriminator.ranking.clamp=0.001")
    stuck = critic(*settings_, lr=1e-2)
    metrics = train(stuck, data, 3)
    inside = (stuck.compute_scores(data)["student_scores"] - stuck.compute_scores(data)["teacher_scores"]).abs() < 0.002
    assert not inside.any(), "all pairs must be beyond the clamp"
    losing = metrics[0]["critic/diff_penalty"] == 0.0
    assert losing and metrics[-1]["critic/grad_norm"] == 0.0
    assert metrics[-1]["critic/score_diff"] == metrics[0]["critic/score_diff"]


def test_raw_sums_of_a_fresh_head_explode_the_gradient():
    """The regulariser is on sums: on a head with large values it dwarfs the ranking term."""
    plain = train(critic(RANKING, "critic.discriminator.ranking.reg_coef=0", lr=0.0), different(), 1)[0]
    heavy = train(critic(RANKING, "critic.discriminator.ranking.reg_coef=1.0", lr=0.0), different(), 1)[0]
    assert heavy["critic/grad_norm"] > 10 > plain["critic/grad_norm"]
    assert heavy["critic/score_reg"] == plain["critic/score_reg"]


def test_a_discriminator_that_sees_only_length_rewards_it():
    """Random teachers of 8 tokens against random students of 1, 3 and 6: there is nothing else to go by."""
    data = different()
    data.batch["response_mask"] = (torch.arange(8) < torch.tensor([[1, 3, 6]] * 4).unsqueeze(-1)).long()
    data.batch["teacher_attention_mask"][:, -8:] = 1
    biased = critic("critic.discriminator.loss=bradley_terry", "critic.discriminator.pooling=sum", lr=3e-3)
    history = [step(biased, random_tokens(data, seed)) for seed in range(80)]
    late = [metrics["critic/length_reward_corr"] for metrics in history[-20:]]
    assert history[-1]["critic/length_ratio"] == pytest.approx(10 / 24)
    assert sum(late) / len(late) > 0.5


def test_an_over_fitted_discriminator_shows_on_held_out_answers():
    """Random answers have nothing to learn: what it knows of its own batch says nothing about another."""
    discriminator = critic("critic.discriminator.loss=bradley_terry", lr=1e-2)
    trained = train(discriminator, different(), 60)[-1]["critic/d_acc"]
    held_out = []
    for seed in range(8):
        data = random_tokens(different(), seed)
        scores = discriminator.compute_scores(data)
        held_out.append((scores["teacher_scores"] > scores["student_scores"]).float().mean().item())
    assert trained == 1.0
    assert trained - sum(held_out) / len(held_out) > 0.25
