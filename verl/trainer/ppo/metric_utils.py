"""From a batch to a dict of floats. Batches have one row per prompt: B prompts, N answers each, T tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from verl.protocol import DataProto
from verl.trainer.ppo.discriminator_algos import PairScores, discriminator_metrics

# A group whose scores spread less than this has no advantage worth the name.
ZERO_STD = 1e-6
QUANTILES = (5, 25, 50, 75, 95)


def mean_max_min(name: str, values: torch.Tensor) -> dict[str, float]:
    """`{name}/mean`, `/max` and `/min`."""
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }


def quantile_metrics(name: str, values: torch.Tensor) -> dict[str, float]:
    """`{name}/p05` to `/p95`, the quantiles of all values, linearly between two of them."""
    ranks = torch.tensor([rank / 100 for rank in QUANTILES], dtype=torch.float32)
    found = torch.quantile(values.float().flatten().cpu(), ranks)
    return {f"{name}/p{rank:02d}": value for rank, value in zip(QUANTILES, found.tolist(), strict=True)}


def _length_metrics(name: str, lengths: torch.Tensor, limit: int) -> dict[str, float]:
    clip_ratio = (lengths >= limit).float().mean().item()
    return {**mean_max_min(name, lengths), f"{name}/clip_ratio": clip_ratio}


def compute_length_metrics(batch: DataProto) -> dict[str, float]:
    """`response_length/*` and `prompt_length/*` in tokens; `clip_ratio` is the share that fills the width."""
    metrics = {}
    if "response_mask" in batch.batch:
        mask = batch.batch["response_mask"]
        metrics |= _length_metrics("response_length", mask.sum(-1), mask.shape[-1])
    prompts = batch.batch["attention_mask"]
    return metrics | _length_metrics("prompt_length", prompts.sum(-1), prompts.shape[-1])


def compute_data_metrics(batch: DataProto, use_critic: bool = True) -> dict[str, float]:
    """Lengths and, once answers are scored, statistics of scores, rewards and advantages over all answers."""
    metrics = compute_length_metrics(batch)
    if not use_critic:
        return metrics
    mask = batch.batch["response_mask"].bool()
    metrics |= mean_max_min("critic/score", batch.batch["token_level_scores"].sum(-1))
    metrics |= mean_max_min("critic/rewards", batch.batch["token_level_rewards"].sum(-1))
    metrics |= mean_max_min("critic/advantages", batch.batch["advantages"][mask])
    return metrics | mean_max_min("critic/returns", batch.batch["returns"][mask])


def pair_scores(batch: DataProto) -> PairScores:
    """The discriminator's scores of a batch, students (B, N) against teachers (B, 1)."""
    return PairScores(
        student=batch.batch["student_scores"],
        teacher=batch.batch["teacher_scores"],
        student_raw=batch.batch["student_raw_scores"],
        teacher_raw=batch.batch["teacher_raw_scores"],
    )


def compute_discriminator_metrics(batch: DataProto) -> dict[str, float]:
    """What the discriminator made of fresh answers: accuracy, differences, means per score and per token, and how
    much its scores follow length."""
    scores = pair_scores(batch)
    tensors = batch.batch
    metrics = {name: value.item() for name, value in discriminator_metrics(scores).items()}
    for who, values in (("student", scores.student), ("teacher", scores.teacher)):
        metrics |= quantile_metrics(f"critic/{who}_score", values)
    for who, raw in (("student", scores.student_raw), ("teacher", scores.teacher_raw)):
        metrics[f"critic/{who}_value_mean"] = (raw.sum() / tensors[f"{who}_score_tokens"].sum()).item()

    lengths = tensors["response_mask"].sum(-1).float()
    teacher_lengths = tensors["teacher_attention_mask"][:, -tensors["teacher_response"].shape[1] :].sum(-1).float()
    metrics["critic/length_ratio"] = (lengths.mean() / teacher_lengths.mean()).item()
    metrics["critic/length_reward_corr"] = correlation(lengths.flatten(), scores.student.flatten())
    if scores.student.shape[1] > 1:
        spread = scores.student.std(-1)
        metrics["critic/group_score_std"] = spread.mean().item()
        metrics["critic/zero_std_group_frac"] = (spread < ZERO_STD).float().mean().item()
        metrics["critic/group_length_spread"] = (lengths.std(-1) / lengths.mean(-1)).mean().item()
        # Answers are compared with others to their prompt: how prompts differ in length and score is left out.
        metrics["critic/length_reward_corr_in_groups"] = correlation(
            (lengths - lengths.mean(-1, keepdim=True)).flatten(),
            (scores.student - scores.student.mean(-1, keepdim=True)).flatten(),
        )
    return metrics


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's correlation of two vectors; 0 where either does not vary, which is what "no relation" means here."""
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return ((x @ y) / (x.norm() * y.norm())).item()


def compute_sync_metrics(batch: DataProto) -> dict[str, float]:
    """The gap between token probabilities the engine reported and those the trainer computes, on the prompts it
    reported. The same weights give a gap of rounding alone."""
    reported = batch.batch["rollout_log_probs_mask"].bool()
    mask = batch.batch["response_mask"].bool() & reported[:, None, None]
    gap = (batch.batch["rollout_log_probs"].exp() - batch.batch["old_log_probs"].exp()).abs()[mask]
    return {"training/rollout_probs_diff_mean": gap.mean().item(), "training/rollout_probs_diff_max": gap.max().item()}


def compute_timing_metrics(batch: DataProto, timing: Mapping[str, float]) -> dict[str, float]:
    """`timing_s/*` in seconds, and milliseconds per token for the stages whose work grows with tokens."""
    metrics = {f"timing_s/{name}": seconds for name, seconds in timing.items()}
    total, answered = count_tokens(batch)
    tokens = {
        "gen": answered,
        **dict.fromkeys(("old_log_prob", "ref", "values", "update_critic", "update_actor"), total),
    }
    for name, count in tokens.items():
        if name in timing and count:
            metrics[f"timing_per_token_ms/{name}"] = timing[name] * 1000 / count
    return metrics


def compute_throughout_metrics(batch: DataProto, timing: Mapping[str, float], n_gpus: int) -> dict[str, float]:
    """Tokens of the batch, seconds of the step, and tokens per second and process."""
    total, _ = count_tokens(batch)
    seconds = timing["step"]
    return {
        "perf/total_num_tokens": total,
        "perf/time_per_step": seconds,
        "perf/throughput": total / (seconds * n_gpus),
    }


def count_tokens(batch: DataProto) -> tuple[int, int]:
    """(tokens of all sequences, answer tokens): the students' if there are any, else the teachers'.

    Every sequence has its prompt here, also where the prompt is computed once for several.
    """
    prompts = int(batch.batch["attention_mask"].sum())
    if "response_mask" in batch.batch:
        answers = int(batch.batch["response_mask"].sum())
        return prompts * batch.batch["response_mask"].shape[1] + answers, answers
    with_teacher = int(batch.batch["teacher_attention_mask"].sum())
    return with_teacher, with_teacher - prompts
