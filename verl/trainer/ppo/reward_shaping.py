"""Changes to the rewards of a batch before its answers are compared: pure functions of tensors.

B prompts, N answers each. An answer that is *left out* takes no part in its group's comparison: it has no advantage,
and the group's mean and deviation are those of the others.
"""

from __future__ import annotations

import torch

CUT_ANSWERS = ("keep", "lowest", "leave_out")


def settle_cut_answers(rewards: torch.Tensor, cut: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B, N), and the answers left out (B, N), once it is settled what an answer that was cut is worth.

    A discriminator sees how an answer ends. One that was cut (`cut`, (B, N)) has no end, and may score best within its
    group for that alone; the student then learns never to stop.

        keep       cut answers are compared like others
        lowest     a cut answer is worth less than the lowest of its group's complete answers, by the batch's standard
                   deviation within groups at least; where no answer of a group is complete, none is better than
                   another, and all are left out
        leave_out  cut answers are left out; where length pays, answers still grow until they are cut

    Raises:
        ValueError: unknown mode.
    """
    nothing = torch.zeros_like(cut)
    if mode == "keep":
        return rewards, nothing
    if mode == "leave_out":
        return rewards, cut
    if mode != "lowest":
        raise ValueError(f"unknown cut_answers {mode!r}: use one of {', '.join(CUT_ANSWERS)}")
    lowest = rewards.masked_fill(cut, torch.inf).amin(-1, keepdim=True)
    deviation = rewards.var(-1).mean().sqrt()
    return torch.where(cut, torch.minimum(rewards, lowest - deviation), rewards), cut.all(-1, keepdim=True) | nothing


def without_length(
    rewards: torch.Tensor, lengths: torch.Tensor, counted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (B, N) less their regression on length, and the slope (reward per token, 0-d).

    Both are taken relative to their group's mean, because only differences within a group make advantages: one slope
    for the whole batch, by least squares over the `counted` (B, N) answers. Corrected rewards of a group keep its mean.
    (Disentangling length from reward as in ODIN, arXiv 2402.07319, but after the fact and linear.)
    """
    kind = rewards.dtype
    rewards, lengths, weight = rewards.double(), lengths.double(), counted.double()
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    length = lengths - (lengths * weight).sum(-1, keepdim=True) / count
    length = length * weight.any(-1, keepdim=True)  # A group of which nothing counts stays as it is.
    reward = rewards - (rewards * weight).sum(-1, keepdim=True) / count
    spread = (weight * length.square()).sum()
    slope = torch.where(spread > 0, (weight * length * reward).sum() / spread.clamp(min=1e-12), 0.0)
    return (rewards - slope * length).to(kind), slope


def flat_groups(rewards: torch.Tensor, left_out: torch.Tensor, min_std: float) -> torch.Tensor:
    """(B, 1), true for groups whose rewards (B, N), those `left_out` (B, N) apart, have a standard deviation below
    `min_std` (the unbiased one, as in the advantages), or fewer than two members left."""
    weight = (~left_out).double()
    count = weight.sum(-1, keepdim=True)
    mean = (rewards * weight).sum(-1, keepdim=True) / count.clamp(min=1)
    std = ((weight * (rewards - mean).square()).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (std < min_std) | (count < 2)
