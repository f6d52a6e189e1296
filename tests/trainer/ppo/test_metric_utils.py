"""Metrics of one small batch, worked out by hand: two prompts, two answers each."""

import math

import pytest
import torch
from scipy.stats import pearsonr

from verl.protocol import DataProto
from verl.trainer.ppo import metric_utils as mu


def mask_of(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)).long()


def batch_of(**more):
    """Prompts of 3 and 1 tokens (width 3, left-padded), answers of 4, 2 and 1, 3 (width 4)."""
    tensors = {
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        "response_mask": mask_of([[4, 2], [1, 3]], 4),
        **more,
    }
    return DataProto.from_dict({name: value for name, value in tensors.items() if value is not None})


LENGTHS = {
    "response_length/mean": 2.5,
    "response_length/max": 4.0,
    "response_length/min": 1.0,
    "response_length/clip_ratio": 0.25,  # one of four fills the width
    "prompt_length/mean": 2.0,
    "prompt_length/max": 3.0,
    "prompt_length/min": 1.0,
    "prompt_length/clip_ratio": 0.5,
}


def test_length_metrics():
    assert mu.compute_length_metrics(batch_of()) == pytest.approx(LENGTHS)


def test_length_metrics_without_answers():
    metrics = mu.compute_length_metrics(batch_of(response_mask=None))
    assert metrics == pytest.approx({k: v for k, v in LENGTHS.items() if k.startswith("prompt_length/")})


def test_data_metrics():
    scores = torch.zeros(2, 2, 4)
    scores[..., 0] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    advantages = torch.full((2, 2, 4), 50.0)
    # Under the mask: 4 tokens of 1, 2 of -2, 1 of 7, 3 of 0: sum 7 over 10 tokens.
    mask = mask_of([[4, 2], [1, 3]], 4).bool()
    values = torch.tensor([[1.0, -2.0], [7.0, 0.0]])[..., None].expand(2, 2, 4)
    advantages = torch.where(mask, values, advantages)
    batch = batch_of(
        token_level_scores=scores, token_level_rewards=scores - 1.0, advantages=advantages, returns=2 * advantages
    )
    assert mu.compute_data_metrics(batch) == pytest.approx(
        {
            **LENGTHS,
            "critic/score/mean": 3.0,
            "critic/score/max": 6.0,
            "critic/score/min": 1.0,
            "critic/rewards/mean": -1.0,  # every row's sum is 4 lower
            "critic/rewards/max": 2.0,
            "critic/rewards/min": -3.0,
            "critic/advantages/mean": 0.7,
            "critic/advantages/max": 7.0,
            "critic/advantages/min": -2.0,
            "critic/returns/mean": 1.4,
            "critic/returns/max": 14.0,
            "critic/returns/min": -4.0,
        }
    )


def test_data_metrics_of_sft_are_lengths():
    assert mu.compute_data_metrics(batch_of(), use_critic=False) == pytest.approx(LENGTHS)


# ---- correlation


def test_correlation_is_pearsons():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator)
    y = 0.3 * x + torch.randn(50, generator=generator)
    assert mu.correlation(x, y) == pytest.approx(pearsonr(x.numpy(), y.numpy())[0], abs=1e-6)
    assert mu.correlation(x, -2 * x + 7) == pytest.approx(-1.0)


@pytest.mark.parametrize("value", [0.0, 5.0, 0.1, 10.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlation_with_a_constant_is_zero(value, dtype):
    x, constant = torch.arange(7.0), torch.full((7,), value, dtype=dtype)
    assert mu.correlation(x, constant) == 0.0
    assert mu.correlation(constant, x) == 0.0
    assert mu.correlation(constant, constant) == 0.0


def test_correlation_of_integers():
    # x - 2 = -1, 0, 1 and y - 2 = -2, 1, 1: (2 + 0 + 1) / sqrt(2 * 6)
    x, y = torch.tensor([1, 2, 3]), torch.tensor([0, 3, 3])
    assert mu.correlation(x, y) == pytest.approx(3 / math.sqrt(12))


# ---- discriminator


def scored_batch(student=((0.1, 0.3), (0.5, 0.5))):
    """Teacher answers of 4 and 2 tokens (width 5) after prompts of 3 and 1."""
    prompts = torch.tensor([[1, 1, 1], [0, 0, 1]])
    return batch_of(
        student_scores=torch.tensor(student),
        teacher_scores=torch.tensor([[0.4], [0.5]]),
        student_raw_scores=torch.tensor([[1.0, 2.0], [3.0, 6.0]]),
        teacher_raw_scores=torch.tensor([[4.0], [5.0]]),
        student_score_tokens=torch.tensor([[3.0, 2.0], [1.0, 4.0]]),
        teacher_score_tokens=torch.tensor([[4.0], [2.0]]),
        teacher_attention_mask=torch.cat([prompts, mask_of([4, 2], 5)], -1),
        teacher_response=torch.zeros(2, 5, dtype=torch.long),
    )


def quantiles(who, *values):
    return dict(zip((f"critic/{who}_score/p{rank}" for rank in ("05", "25", "50", "75", "95")), values, strict=True))


def test_discriminator_metrics():
    assert mu.compute_discriminator_metrics(scored_batch()) == pytest.approx(
        {
            "critic/d_acc": 0.5,  # d = .3, .1, 0, 0
            "critic/score_diff": 0.1,
            "critic/raw_score_diff": 1.5,  # 3, 2, 2, -1
            "critic/student_score_mean": 0.35,
            "critic/teacher_score_mean": 0.45,
            "critic/student_score_std": math.sqrt(0.0275),  # .1 .3 .5 .5 about .35: (.0625 + .0025 + 2 * .0225) / 4
            "critic/teacher_score_std": 0.05,
            "critic/group_score_std": 0.1 / math.sqrt(2),  # sqrt(2) * .1 and 0
            "critic/student_value_mean": 1.2,  # 12 over 10 tokens
            "critic/teacher_value_mean": 1.5,  # 9 over 6 tokens
            "critic/length_ratio": 2.5 / 3,
            "critic/length_reward_corr": pearsonr([4, 2, 1, 3], [0.1, 0.3, 0.5, 0.5])[0],
            # Less their groups' means, lengths are 1 -1 -1 1 and scores -.1 .1 0 0: -.2 / sqrt(4 * .02).
            "critic/length_reward_corr_in_groups": -0.2 / math.sqrt(0.08),
            "critic/group_length_spread": (math.sqrt(2) / 3 + math.sqrt(2) / 2) / 2,  # lengths 4 2 and 1 3
            "critic/zero_std_group_frac": 0.5,  # the second group
            # Places .15, .75, 1.5, 2.25, 2.85 of .1 .3 .5 .5, and .05, .25, .5, .75, .95 of .4 .5.
            **quantiles("student", 0.13, 0.25, 0.4, 0.5, 0.5),
            **quantiles("teacher", 0.405, 0.425, 0.45, 0.475, 0.495),
        },
        abs=1e-6,
    )


def test_zero_std_counts_rounding_as_none():
    # A spread of 1e-8 is none, one of 1e-3 is one.
    metrics = mu.compute_discriminator_metrics(scored_batch(((0.1, 0.1 + 1e-8), (0.5, 0.501))))
    assert metrics["critic/zero_std_group_frac"] == 0.5


def test_groups_of_one_have_no_spread_to_report():
    batch = scored_batch()
    first = {name: batch.batch[name] for name in batch.batch.keys()}  # noqa: SIM118
    for name in ("student_scores", "student_raw_scores", "student_score_tokens", "response_mask"):
        first[name] = first[name][:, :1]
    metrics = mu.compute_discriminator_metrics(DataProto.from_dict(first))
    assert "critic/zero_std_group_frac" not in metrics and "critic/length_reward_corr_in_groups" not in metrics
    assert metrics["critic/d_acc"] == 0.5  # d = .3 and 0


def test_pair_scores_are_the_columns():
    scores = mu.pair_scores(scored_batch())
    assert scores.teacher.shape == (2, 1)
    assert scores.difference.flatten().tolist() == pytest.approx([0.3, 0.1, 0.0, 0.0])
    assert (scores.student_raw.sum().item(), scores.teacher_raw.sum().item()) == (12.0, 9.0)


# ---- engine against trainer


def test_sync_metrics_look_at_reported_prompts_and_real_tokens():
    trainer = torch.full((2, 2, 4), 0.5)
    engine = trainer.clone()
    engine[0, 0, 0] = 0.6  # gap 0.1 of prompt 0, which reported
    engine[0, 1, 1] = 0.3  # gap 0.2
    engine[0, 1, 3] = 0.9  # outside the mask
    engine[1] = 0.01  # prompt 1 did not report
    metrics = mu.compute_sync_metrics(
        batch_of(
            rollout_log_probs=engine.log(), old_log_probs=trainer.log(), rollout_log_probs_mask=torch.tensor([1, 0])
        )
    )
    # 6 real tokens of prompt 0: (0.1 + 0.2) / 6
    assert metrics == pytest.approx(
        {"training/rollout_probs_diff_mean": 0.05, "training/rollout_probs_diff_max": 0.2}, abs=1e-6
    )


# ---- time


def test_count_tokens():
    # 4 prompt tokens for each of 2 answers, and 10 answer tokens.
    assert mu.count_tokens(batch_of()) == (18, 10)
    # SFT: no student answers; the teacher's sequences have (3 + 4) + (1 + 2) tokens, 6 of them answers.
    teacher = torch.cat([torch.tensor([[1, 1, 1], [0, 0, 1]]), mask_of([4, 2], 5)], -1)
    assert mu.count_tokens(batch_of(response_mask=None, teacher_attention_mask=teacher)) == (10, 6)


def test_timing_metrics():
    timing = {"gen": 2.0, "update_actor": 1.0, "ref": 0.9, "adv": 0.5, "step": 10.0}
    assert mu.compute_timing_metrics(batch_of(), timing) == pytest.approx(
        {
            "timing_s/gen": 2.0,
            "timing_s/update_actor": 1.0,
            "timing_s/ref": 0.9,
            "timing_s/adv": 0.5,
            "timing_s/step": 10.0,
            "timing_per_token_ms/gen": 200.0,  # 2000 ms over 10 answer tokens
            "timing_per_token_ms/update_actor": 1000 / 18,
            "timing_per_token_ms/ref": 50.0,  # 900 / 18
        }
    )


def test_throughput_metrics():
    # 18 tokens in 10 s on 3 processes
    assert mu.compute_throughout_metrics(batch_of(), {"step": 10.0}, n_gpus=3) == pytest.approx(
        {"perf/total_num_tokens": 18, "perf/time_per_step": 10.0, "perf/throughput": 0.6}
    )
