"""Weights for answers that an engine drew with other probabilities than the policy's (`algorithm.rollout_is`)."""

from __future__ import annotations

import math

import torch


def truncated_importance_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, level: str, threshold: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weights min(p / q, threshold) of answers that an engine drew with q, for a policy that computes p: truncated
    importance sampling (Ionides 2008; as IMPALA's rho, arXiv 1802.01561, section 4.1).

    Args:
        log_probs, rollout_log_probs: (..., T) of the tokens, by the policy before its update and by the engine.
        response_mask: (..., T).
        level: `token`: a ratio of each token; `sequence`: the product of an answer's, for all of its tokens.

    Returns:
        (..., T), 0 outside the mask, without a gradient; and `rollout_corr/rollout_is_*` of the weights, each token or
        each answer counted once: their mean, std, min and max, the shares whose ratio was above the threshold and below
        1 / threshold, and the effective sample size (sum w)^2 / sum w^2 over their number (Kish 1965).
    """
    mask = response_mask.bool()
    log_ratios = (log_probs - rollout_log_probs).detach().masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratios, counted = log_ratios.sum(-1, keepdim=True), mask.any(-1, keepdim=True)
    else:
        counted = mask
    limit = math.log(threshold)
    weights = log_ratios.clamp(max=limit).exp()
    ours, ratios = weights[counted].double(), log_ratios[counted]
    metrics = {
        "mean": ours.mean(),
        "std": ours.std(correction=0),
        "min": ours.min(),
        "max": ours.max(),
        "ratio_fraction_high": (ratios > limit).double().mean(),
        "ratio_fraction_low": (ratios < -limit).double().mean(),
        "eff_sample_size": ours.sum() ** 2 / (ours.square().sum() * len(ours)),
    }
    return weights * mask, {f"rollout_corr/rollout_is_{name}": value.item() for name, value in metrics.items()}
