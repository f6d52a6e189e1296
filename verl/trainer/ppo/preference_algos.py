"""Losses on pairs of answers to one prompt, one chosen and one rejected, as pure functions of tensors.

B pairs. A log-prob here is a whole answer's: the sum over its tokens, or a mean where the caller wants one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def compute_preference_loss(
    chosen_log_prob: torch.Tensor,
    rejected_log_prob: torch.Tensor,
    chosen_ref_log_prob: torch.Tensor,
    rejected_ref_log_prob: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """DPO (arXiv 2305.18290, eq. 7): the mean over pairs of -logsigmoid(reward(chosen) - reward(rejected)).

    An answer's implicit reward is beta * (log-prob - reference log-prob), in nats.

    Args:
        chosen_log_prob, rejected_log_prob: (B,), with the policy's gradient.
        chosen_ref_log_prob, rejected_ref_log_prob: (B,), the frozen reference's.

    Returns:
        the loss, and its metrics as means over pairs: `actor/soda_loss`, the two rewards, `actor/soda_margin` between
        them, and `actor/soda_acc`, the share of pairs with the chosen answer's strictly above.
    """
    chosen = beta * (chosen_log_prob - chosen_ref_log_prob)
    rejected = beta * (rejected_log_prob - rejected_ref_log_prob)
    margin = chosen - rejected
    loss = -F.logsigmoid(margin).mean()
    metrics = {
        "actor/soda_loss": loss,
        "actor/soda_acc": (margin > 0).float().mean(),
        "actor/soda_margin": margin.mean(),
        "actor/soda_chosen_reward": chosen.mean(),
        "actor/soda_rejected_reward": rejected.mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
