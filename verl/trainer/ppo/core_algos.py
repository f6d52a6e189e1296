"""The algorithms as pure functions of tensors: advantages, policy, SFT and KL losses.

Shapes: R rows (answers), T response tokens. Masks are 1 on real response tokens. The discriminator's losses are in
`discriminator_algos`, those on preference pairs in `preference_algos`; both are importable from here too, where users
look for them. No config object, no Ray, no FSDP: a registered policy loss reads its clip constants as attributes of
whatever it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch

from verl.trainer.ppo.discriminator_algos import (
    DISCRIMINATOR_LOSS_REGISTRY,
    POOLINGS,
    PairScores,
    adapted_temperature,
    closing_eos,
    compute_discriminator_loss,
    discriminator_metrics,
    ends_with_eos,
    get_discriminator_loss_fn,
    pool_scores,
    register_discriminator_loss,
    score_mask,
    with_one_eos,
)
from verl.trainer.ppo.preference_algos import compute_preference_loss
from verl.utils.torch_functional import entropy_from_logits, masked_mean, masked_sum

__all__ = [
    "ADV_ESTIMATOR_REGISTRY",
    "DISCRIMINATOR_LOSS_REGISTRY",
    "LOSS_AGG_MODES",
    "POLICY_LOSS_REGISTRY",
    "POOLINGS",
    "AdaptiveKLController",
    "AdvantageEstimator",
    "FixedKLController",
    "PairScores",
    "adapted_temperature",
    "agg_loss",
    "closing_eos",
    "compute_discriminator_loss",
    "compute_entropy_loss",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss",
    "compute_policy_loss_gspo",
    "compute_policy_loss_vanilla",
    "compute_preference_loss",
    "compute_rewards",
    "compute_sft_loss",
    "discriminator_metrics",
    "ends_with_eos",
    "get_adv_estimator_fn",
    "get_discriminator_loss_fn",
    "get_kl_controller",
    "get_policy_loss_fn",
    "kl_penalty",
    "kl_penalty_forward",
    "pool_scores",
    "register_adv_est",
    "register_discriminator_loss",
    "register_policy_loss",
    "score_mask",
    "with_one_eos",
]

# ---------------------------------------------------------------- aggregation

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> torch.Tensor:
    """Reduce per-token losses (R, T) under a mask (R, T) to a scalar.

    By default the loss is normalised by what is in `loss_mask`. Given the totals of a whole mini-batch
    (`batch_num_tokens` real tokens, `global_batch_size` sequences, over all `dp_size` ranks), the result is this
    part's share of the mini-batch's loss, times `dp_size` because data parallelism averages gradients: summed over
    micro-batches and averaged over ranks it is the same number for every split.

    `seq-mean-token-sum-norm` divides each sequence's sum by `loss_scale_factor` (default: T), as Dr. GRPO does
    (arXiv 2503.20783, section 3.2).

    Raises:
        ValueError: unknown mode, or several ranks without the mini-batch's total.
    """
    if loss_agg_mode not in LOSS_AGG_MODES:
        raise ValueError(f"unknown loss_agg_mode {loss_agg_mode!r}: use one of {', '.join(LOSS_AGG_MODES)}")
    total, name = (
        (batch_num_tokens, "batch_num_tokens")
        if loss_agg_mode == "token-mean"
        else (global_batch_size, "global_batch_size")
    )
    if dp_size > 1 and total is None:
        raise ValueError(f"loss_agg_mode={loss_agg_mode} on {dp_size} ranks needs the mini-batch's {name}, got None")

    per_sequence = masked_sum(loss_mat, loss_mask, axis=-1)
    if loss_agg_mode == "token-mean":
        denominator = loss_mask.sum() if total is None else total
        return per_sequence.sum() / denominator * dp_size
    if loss_agg_mode == "seq-mean-token-mean":
        per_sequence = per_sequence / loss_mask.sum(-1).clamp(min=1)
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / (loss_scale_factor or loss_mask.shape[-1])
    denominator = loss_mask.shape[0] if total is None else total
    return per_sequence.sum() / denominator * dp_size


# ---------------------------------------------------------------- advantages

ADV_ESTIMATOR_REGISTRY: dict[str, Callable] = {}


class AdvantageEstimator(str, Enum):
    """Estimators this trainer ships; more can be registered by name."""

    GRPO = "grpo"


def _register(registry: dict[str, Callable], kind: str, name: str | Enum) -> Callable[[Callable], Callable]:
    key = name.value if isinstance(name, Enum) else name

    def decorate(fn: Callable) -> Callable:
        if registry.get(key, fn) is not fn:
            raise ValueError(f"{kind} {key!r} is already registered as {registry[key].__qualname__}; pick another name")
        registry[key] = fn
        return fn

    return decorate


def _lookup(registry: dict[str, Callable], kind: str, name: str | Enum) -> Callable:
    key = name.value if isinstance(name, Enum) else name
    if key not in registry:
        raise ValueError(f"unknown {kind} {key!r}: registered are {', '.join(sorted(registry))}")
    return registry[key]


def register_adv_est(name: str | AdvantageEstimator) -> Callable[[Callable], Callable]:
    """Register an advantage estimator; ValueError if the name is taken by another function."""
    return _register(ADV_ESTIMATOR_REGISTRY, "advantage estimator", name)


def get_adv_estimator_fn(name: str | AdvantageEstimator) -> Callable:
    """The registered estimator; ValueError if there is none of that name."""
    return _lookup(ADV_ESTIMATOR_REGISTRY, "advantage estimator", name)


@register_adv_est(AdvantageEstimator.GRPO)
def compute_grpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[str] | np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-relative advantages, (score - group mean) / (group std + epsilon) (DeepSeekMath, section 4.1.2).

    A row's score is the sum of its rewards; the standard deviation is the unbiased one. A group of one has no
    spread and gets advantage 0.

    Args:
        token_level_rewards: (R, T); for outcome rewards only one token is non-zero.
        response_mask: (R, T).
        index: R group names (the prompt's uid).
        norm_adv_by_std_in_grpo: False leaves the division out (Dr. GRPO, arXiv 2503.20783).

    Returns:
        advantages and returns, both (R, T) and equal, zero outside the mask.
    """
    # In fp64 the mean of equal scores is exact; in fp32 its rounding error, divided by a spread as small, is not.
    scores = (token_level_rewards * response_mask).sum(-1).double()
    _, inverse = np.unique(np.asarray(index), return_inverse=True)
    group = torch.as_tensor(inverse.reshape(-1), device=scores.device)
    count = torch.bincount(group).to(scores.dtype)

    mean = torch.zeros_like(count).index_add_(0, group, scores) / count
    centred = scores - mean[group]
    if norm_adv_by_std_in_grpo:
        squares = torch.zeros_like(count).index_add_(0, group, centred.square())
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std[group] + epsilon)
    advantages = centred.to(token_level_rewards.dtype).unsqueeze(-1) * response_mask
    return advantages, advantages


# ---------------------------------------------------------------- policy losses

POLICY_LOSS_REGISTRY: dict[str, Callable] = {}


class ClipConstants(Protocol):
    """The constants that a policy loss reads from its `config`: any object with these attributes will do."""

    clip_ratio: float
    clip_ratio_low: float | None
    clip_ratio_high: float | None
    clip_ratio_c: float


def register_policy_loss(name: str) -> Callable[[Callable], Callable]:
    """Register `fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None,
    **totals) -> (loss, metrics)`; `totals` are `agg_loss`'s and must reach it. ValueError if the name is taken."""
    return _register(POLICY_LOSS_REGISTRY, "policy loss", name)


def get_policy_loss_fn(name: str) -> Callable:
    """The registered policy loss; ValueError if there is none of that name."""
    return _lookup(POLICY_LOSS_REGISTRY, "policy loss", name)


def _clip_range(config: ClipConstants) -> tuple[float, float]:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return low, high


@register_policy_loss("vanilla")
def compute_policy_loss_vanilla(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config: ClipConstants,
    rollout_is_weights: torch.Tensor | None = None,
    **totals: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7) with dual clip (arXiv 1912.09729, eq. 5).

    All tensors (R, T). Where the advantage is negative, the loss is capped at -clip_ratio_c * advantage.

    Returns:
        the aggregated loss, and 0-d tensors `actor/pg_clipfrac`, `actor/pg_clipfrac_lower`, `actor/ppo_kl`
        (means over the mask).
    """
    if config.clip_ratio_c <= 1.0:
        raise ValueError(f"clip_ratio_c must be greater than 1.0, got {config.clip_ratio_c}")
    low, high = _clip_range(config)
    log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()

    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    pessimistic = torch.maximum(plain, clipped)
    cap = -advantages * config.clip_ratio_c
    negative = advantages < 0
    losses = torch.where(negative, torch.minimum(pessimistic, cap), pessimistic)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights

    metrics = {
        "actor/pg_clipfrac": masked_mean((clipped > plain).float(), response_mask),
        "actor/pg_clipfrac_lower": masked_mean(((pessimistic > cap) & negative).float(), response_mask),
        "actor/ppo_kl": masked_mean(-log_ratio, response_mask),
    }
    return agg_loss(losses, response_mask, loss_agg_mode, **totals), {k: v.detach() for k, v in metrics.items()}


@register_policy_loss("gspo")
def compute_policy_loss_gspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config: ClipConstants,
    rollout_is_weights: torch.Tensor | None = None,
    **totals: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GSPO (arXiv 2507.18071, eq. 5-7): one ratio per sequence, exp(mean token log-ratio), clipped to [1-low, 1+high].

    All tensors (R, T). `loss_agg_mode` is accepted and not used: the sequence is GSPO's unit, so the aggregation is
    always seq-mean-token-mean. The log-ratio is capped at 10 against overflow.

    Returns:
        as `compute_policy_loss_vanilla`; `actor/pg_clipfrac_lower` is 0, there is no dual clip.
    """
    low, high = _clip_range(config)
    log_ratio = log_prob - old_log_prob
    lengths = response_mask.sum(-1).clamp(min=1)
    sequence_log_ratio = (log_ratio * response_mask).sum(-1) / lengths
    ratio = sequence_log_ratio.clamp(max=10.0).exp().unsqueeze(-1)

    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    losses = torch.maximum(plain, clipped)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights

    metrics = {
        "actor/pg_clipfrac": masked_mean((clipped > plain).float(), response_mask),
        "actor/pg_clipfrac_lower": torch.zeros((), device=losses.device),
        "actor/ppo_kl": masked_mean(-log_ratio, response_mask),
    }
    loss = agg_loss(losses, response_mask, "seq-mean-token-mean", **totals)
    return loss, {k: v.detach() for k, v in metrics.items()}


# ---------------------------------------------------------------- SFT


def compute_sft_loss(
    log_prob: torch.Tensor, response_mask: torch.Tensor, loss_agg_mode: str = "token-mean", **totals: Any
) -> torch.Tensor:
    """Minus the mean log-prob (R, T) of the teacher's tokens over the mask (R, T): cross-entropy, as a scalar."""
    return agg_loss(-log_prob, response_mask, loss_agg_mode, **totals)


# ---------------------------------------------------------------- KL


def kl_penalty_forward(logprob: torch.Tensor, ref_logprob: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """Per-token estimate of KL(actor || reference) from samples of the actor (Schulman, "Approximating KL
    divergence", 2020): `kl`/`k1`, `abs`, `mse`/`k2`, `low_var_kl`/`k3`. All tensors (R, T).

    Raises:
        NotImplementedError: `full`, which needs whole distributions, and anything unknown.
    """
    difference = logprob - ref_logprob
    if kl_penalty in ("kl", "k1"):
        return difference
    if kl_penalty == "abs":
        return difference.abs()
    if kl_penalty in ("mse", "k2"):
        return 0.5 * difference.square()
    if kl_penalty in ("low_var_kl", "k3"):
        log_ratio = (-difference).clamp(-20.0, 20.0)
        return (log_ratio.exp() - log_ratio - 1).clamp(-10.0, 10.0)
    raise NotImplementedError(
        f"kl_penalty {kl_penalty!r} is not available: use kl (k1), abs, mse (k2) or low_var_kl (k3), each also with '+'"
    )


def kl_penalty(logprob: torch.Tensor, ref_logprob: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """`kl_penalty_forward`; a trailing '+' keeps its value and takes k2's gradient, which is unbiased for the
    KL's own gradient (k1's is zero in expectation, k3's biased)."""
    value = kl_penalty_forward(logprob, ref_logprob, kl_penalty.removesuffix("+"))
    if not kl_penalty.endswith("+"):
        return value
    k2 = kl_penalty_forward(logprob, ref_logprob, "k2")
    return k2 - k2.detach() + value.detach()


class FixedKLController:
    """A constant KL coefficient."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Nothing to adapt."""


class AdaptiveKLController:
    """Moves the coefficient towards a target KL (Ziegler et al., arXiv 1909.08593, section 2.2).

    The relative error is clipped to +-0.2; after `n_steps` samples the coefficient grows by
    1 + error * n_steps / horizon.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: float):
        self.value = init_kl_coef
        self.target = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Adapt to the KL seen in the last `n_steps` samples; one that is not finite says nothing."""
        if not math.isfinite(current_kl):
            return
        error = float(np.clip(current_kl / self.target - 1, -0.2, 0.2))
        self.value *= 1 + error * n_steps / self.horizon


def get_kl_controller(kl_ctrl: Any) -> FixedKLController | AdaptiveKLController:
    """The controller that `kl_ctrl.type` names (fixed, adaptive); ValueError for another type or a bad horizon."""
    if kl_ctrl.type == "fixed":
        return FixedKLController(kl_ctrl.kl_coef)
    if kl_ctrl.type == "adaptive":
        if not (kl_ctrl.horizon > 0 and math.isfinite(kl_ctrl.horizon)):
            raise ValueError(f"algorithm.kl_ctrl.horizon must be a positive number, got {kl_ctrl.horizon}")
        return AdaptiveKLController(kl_ctrl.kl_coef, kl_ctrl.target_kl, kl_ctrl.horizon)
    raise ValueError(f"unknown algorithm.kl_ctrl.type {kl_ctrl.type!r}: use fixed or adaptive")


# ---------------------------------------------------------------- names of verl's that nothing here calls


def compute_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange: float = 0.2,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The vanilla loss in its older call form: (pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower)."""

    class Constants:
        clip_ratio = cliprange
        clip_ratio_low = cliprange_low
        clip_ratio_high = cliprange_high

    Constants.clip_ratio_c = clip_ratio_c
    loss, metrics = compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, Constants
    )
    return loss, metrics["actor/pg_clipfrac"], metrics["actor/ppo_kl"], metrics["actor/pg_clipfrac_lower"]


def compute_entropy_loss(
    logits: torch.Tensor, response_mask: torch.Tensor, loss_agg_mode: str = "token-mean", **totals: Any
) -> torch.Tensor:
    """Mean entropy in nats of logits (R, T, V) over the mask (R, T), as a scalar."""
    return agg_loss(entropy_from_logits(logits), response_mask, loss_agg_mode, **totals)


def compute_rewards(
    token_level_scores: torch.Tensor, old_log_prob: torch.Tensor, ref_log_prob: torch.Tensor, kl_ratio: float
) -> torch.Tensor:
    """Scores minus `kl_ratio` times the k1 estimate, per token; all (R, T)."""
    return token_level_scores - kl_ratio * (old_log_prob - ref_log_prob)
