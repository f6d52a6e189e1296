"""The discriminator's scores and losses as pure functions of tensors.

B prompts, N student answers per prompt, T response tokens. A pair is one student answer and the teacher's answer to
the same prompt; d = score(teacher) - score(student). Losses see pooled scores only, student (B, N) against teacher
(B, 1): broadcasting makes the pairs, so a teacher answer is scored once however many students it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from verl.utils.torch_functional import masked_mean, masked_sum
from verl.utils.user_code import cannot_end_the_run, is_user_function, load_user_function

POOLINGS = ("last_token", "mean", "sum")
REGULARISERS = ("raw", "pooled", "centre")


def pool_scores(values: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One score per answer from per-token values (..., T) under a mask (..., T); rows without a token score 0.

    Raises:
        ValueError: unknown pooling.
    """
    total = masked_sum(values, mask, axis=-1)
    if pooling == "sum":
        return total
    if pooling == "mean":
        return total / mask.sum(-1).clamp(min=1).to(values.dtype)
    if pooling == "last_token":
        position = torch.arange(mask.shape[-1], device=mask.device)
        last = (mask.long() * (position + 1)).argmax(-1, keepdim=True)
        return values.gather(-1, last).squeeze(-1) * mask.any(-1)
    raise ValueError(f"unknown pooling {pooling!r}: use one of {', '.join(POOLINGS)}")


def score_mask(
    responses: torch.Tensor,
    response_mask: torch.Tensor,
    eos_token_id: int | Sequence[int],
    exclude_eos: bool | torch.Tensor,
) -> torch.Tensor:
    """The tokens a score is pooled over: `response_mask` (..., T), without the closing EOS (any of several) where
    `exclude_eos`, one bool for all answers or one for each (...,).

    EOS is recognised only as the last real token, so that a pad id equal to it changes nothing. An answer that is
    nothing but EOS keeps it: it must have a score too.
    """
    if exclude_eos is False:
        return response_mask
    lengths = response_mask.sum(-1, keepdim=True)
    chosen = exclude_eos.unsqueeze(-1) if isinstance(exclude_eos, torch.Tensor) else exclude_eos
    return response_mask * ~(closing_eos(responses, response_mask, eos_token_id) & (lengths > 1) & chosen)


def closing_eos(
    responses: torch.Tensor, response_mask: torch.Tensor, eos_token_id: int | Sequence[int]
) -> torch.Tensor:
    """(..., T), true where an answer (..., T) came to its end: on its last real token, if that is EOS (any of several).
    EOS elsewhere is none, and nor is a pad id equal to it."""
    is_last = torch.arange(responses.shape[-1], device=responses.device) == response_mask.sum(-1, keepdim=True) - 1
    ids = torch.tensor(eos_token_id, dtype=responses.dtype, device=responses.device)
    return torch.isin(responses, ids) & is_last


def ends_with_eos(
    responses: torch.Tensor, response_mask: torch.Tensor, eos_token_id: int | Sequence[int]
) -> torch.Tensor:
    """Whether each answer (..., T) came to its end: its last real token is EOS, any of several. An answer that did not
    was cut."""
    return closing_eos(responses, response_mask, eos_token_id).any(-1)


def with_one_eos(
    responses: torch.Tensor, response_mask: torch.Tensor, eos_token_id: int | Sequence[int]
) -> torch.Tensor:
    """Answers (..., T) in which the first of several EOS closes all that came to an end; nothing else changes.

    This is how a discriminator reads them. Teachers' answers are closed with the tokenizer's EOS, the first; a student
    may close its own with another, and that alone would give it away.
    """
    first = eos_token_id if isinstance(eos_token_id, int) else eos_token_id[0]
    return responses.masked_fill(closing_eos(responses, response_mask, eos_token_id), first)


@dataclass(frozen=True)
class PairScores:
    """Pooled scores of the pairs: `student` (B, N) and `teacher` (B, 1) (or both (R,), paired one to one), and the
    sums over the same tokens, `student_raw` and `teacher_raw`."""

    student: torch.Tensor
    teacher: torch.Tensor
    student_raw: torch.Tensor
    teacher_raw: torch.Tensor

    @classmethod
    def pool(
        cls,
        student_values: torch.Tensor,
        teacher_values: torch.Tensor,
        student_mask: torch.Tensor,
        teacher_mask: torch.Tensor,
        pooling: str,
    ) -> PairScores:
        """From per-token values and masks: students (..., T), teachers (..., T) that broadcast against them."""
        return cls(
            student=pool_scores(student_values, student_mask, pooling),
            teacher=pool_scores(teacher_values, teacher_mask, pooling),
            student_raw=pool_scores(student_values, student_mask, "sum"),
            teacher_raw=pool_scores(teacher_values, teacher_mask, "sum"),
        )

    @property
    def difference(self) -> torch.Tensor:
        """d, one per pair."""
        return self.teacher - self.student


@dataclass(frozen=True)
class DiscriminatorLoss:
    """A loss: `fn(PairScores, **constants) -> (scalar, metrics)`, and the pooling it was made for.

    The scalar is a mean over pairs of something that depends on the pair's own scores alone, so that it can be
    computed in parts; metrics are 0-d tensors under the names to log, means over the same pairs.
    """

    fn: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
    pooling: str
    name: str

    def __call__(self, scores: PairScores, **constants: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What `fn` returns for these scores. Raises TypeError where that is no loss: a user's may return anything."""
        with cannot_end_the_run(f"the discriminator loss {self.name}"):
            result = self.fn(scores, **constants)
        problem = loss_problem(result, scores)
        if problem is not None:
            raise TypeError(f"the discriminator loss {self.name}: {problem}")
        return result


def loss_problem(result: Any, scores: PairScores) -> str | None:
    """The reason why something is not what a discriminator loss of these scores is, or None. Values are not looked at,
    only types and shapes."""
    if not (isinstance(result, tuple) and len(result) == 2):
        return f"expected a tuple (tensor, dict), got {type(result).__name__}"
    value, metrics = result
    if not (isinstance(value, torch.Tensor) and isinstance(metrics, dict)):
        return f"expected (tensor, dict), got ({type(value).__name__}, {type(metrics).__name__})"
    if value.shape != () or (scores.difference.requires_grad and not value.requires_grad):
        return f"expected a 0-d tensor with a gradient, got shape {tuple(value.shape)}, {value.requires_grad=}"
    wrong = [name for name, metric in metrics.items() if not (isinstance(metric, torch.Tensor) and metric.shape == ())]
    return f"expected 0-d tensors as metrics; {wrong} are not" if wrong else None


DISCRIMINATOR_LOSS_REGISTRY: dict[str, DiscriminatorLoss] = {}


def register_discriminator_loss(name: str, pooling: str = "mean") -> Callable[[Callable], Callable]:
    """Register a loss (see `DiscriminatorLoss`) with its usual pooling.

    Raises:
        ValueError: the name is another function's, or the pooling unknown.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"discriminator loss {name!r}: unknown pooling {pooling!r}: use one of {', '.join(POOLINGS)}")

    def decorate(fn: Callable) -> Callable:
        known = DISCRIMINATOR_LOSS_REGISTRY.get(name)
        if known is not None and known.fn is not fn:
            raise ValueError(f"discriminator loss {name!r} is already registered; pick another name")
        DISCRIMINATOR_LOSS_REGISTRY[name] = DiscriminatorLoss(fn, pooling, name)
        return fn

    return decorate


def get_discriminator_loss_fn(name: str) -> DiscriminatorLoss:
    """The loss registered under `name`, or the one in a user's file, `path/to/file.py:function`.

    A function from a file need not be registered; it is then meant for `mean` pooling.

    Raises:
        ValueError: nothing of that name is registered, or the file does not give it.
    """
    if is_user_function(name):
        fn = load_user_function(name)
        registered = [loss for loss in DISCRIMINATOR_LOSS_REGISTRY.values() if loss.fn is fn]
        return registered[0] if registered else DiscriminatorLoss(fn, "mean", name)
    if name not in DISCRIMINATOR_LOSS_REGISTRY:
        known = ", ".join(sorted(DISCRIMINATOR_LOSS_REGISTRY))
        raise ValueError(f"unknown discriminator loss {name!r}: use one of {known}, or path/to/file.py:function")
    return DISCRIMINATOR_LOSS_REGISTRY[name]


def adapted_temperature(
    mean_difference: float, offset: float = 0.5, slope: float = 0.5, lowest: float = 0.5, highest: float = 3.0
) -> float:
    """clamp(offset + slope * |mean d|, lowest, highest), in place of a loss's constant `temperature`.

    `mean_difference` is the mean of d over the whole mini-batch. The temperature is a constant for the gradient: small
    while teacher and student score alike, so that the loss sees small differences, and larger as they part.
    """
    return min(max(offset + slope * abs(mean_difference), lowest), highest)


@register_discriminator_loss("bradley_terry", pooling="last_token")
def bradley_terry_loss(scores: PairScores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-logsigmoid(d), mean over pairs (GAD, arXiv 2511.10643, section 2)."""
    ranking = -F.logsigmoid(scores.difference).mean()
    return ranking, {"critic/ranking_loss": ranking}


def _soft_ranking(d: torch.Tensor, temperature: float, clamp: float) -> torch.Tensor:
    """-logsigmoid(clamp(d / temperature, -clamp, clamp)), mean over pairs; log 2 means "cannot tell"."""
    return -F.logsigmoid((d / temperature).clamp(-clamp, clamp)).mean()


@register_discriminator_loss("hinge", pooling="mean")
def hinge_loss(
    scores: PairScores, margin: float = 1.0, ranking_coef: float = 0.5, temperature: float = 2.0, clamp: float = 10.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over pairs of relu(margin - d) + ranking_coef * -logsigmoid(clamp(d / temperature, -clamp, clamp)).

    It wants the teacher ahead by `margin` and has no upper limit. Metrics are the terms without their coefficients.
    """
    d = scores.difference
    lower, ranking = F.relu(margin - d).mean(), _soft_ranking(d, temperature, clamp)
    return lower + ranking_coef * ranking, {"critic/hinge_loss_lower": lower, "critic/ranking_loss": ranking}


@register_discriminator_loss("two_sided_hinge", pooling="mean")
def two_sided_hinge_loss(
    scores: PairScores,
    margin: float = 1.0,
    upper: float = 5.0,
    ranking_coef: float = 0.5,
    temperature: float = 2.0,
    clamp: float = 10.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`hinge_loss` plus the mean of relu(d - upper), which keeps the teacher's lead from growing without bound."""
    loss, metrics = hinge_loss(scores, margin, ranking_coef, temperature, clamp)
    excess = F.relu(scores.difference - upper).mean()
    return loss + excess, {**metrics, "critic/hinge_loss_upper": excess}


@register_discriminator_loss("ranking", pooling="mean")
def ranking_loss(
    scores: PairScores,
    ranking_coef: float = 1.5,
    temperature: float = 2.0,
    clamp: float = 10.0,
    reg_coef: float = 0.005,
    diff_limit: float = 1.5,
    diff_coef: float = 0.5,
    reg_on: str = "raw",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over pairs of

        ranking_coef * -logsigmoid(clamp(d / temperature, -clamp, clamp))
        + reg_coef * regulariser + diff_coef * relu(d - diff_limit)^2

    A soft ranking, a pull of the scores towards zero, and a brake once the teacher leads by more than `diff_limit`.
    The regulariser is, by `reg_on`,

        raw     teacher_raw^2 + student_raw^2: of the sums over tokens, so its gradient grows with the square of an
                answer's length and leaves nothing of the ranking on answers of hundreds of tokens
        pooled  teacher^2 + student^2: of the scores that are ranked
        centre  (teacher + student)^2: holds a pair's mean at zero and its difference free (arXiv 2312.09244, section
                3.2)

    Metrics are the three terms without their coefficients, so that ranking_loss = log 2 means "cannot tell".
    """
    d = scores.difference
    ranking = _soft_ranking(d, temperature, clamp)
    regulariser = score_regulariser(scores, reg_on)
    penalty = F.relu(d - diff_limit).square().mean()
    loss = ranking_coef * ranking + reg_coef * regulariser + diff_coef * penalty
    return loss, {"critic/ranking_loss": ranking, "critic/score_reg": regulariser, "critic/diff_penalty": penalty}


def score_regulariser(scores: PairScores, reg_on: str) -> torch.Tensor:
    """The mean over pairs that `ranking_loss` adds; ValueError for a name it does not know."""
    if reg_on == "raw":
        return scores.teacher_raw.square().mean() + scores.student_raw.square().mean()
    if reg_on == "pooled":
        return scores.teacher.square().mean() + scores.student.square().mean()
    if reg_on == "centre":
        return (scores.teacher + scores.student).square().mean()
    raise ValueError(f"unknown reg_on {reg_on!r}: use one of {', '.join(REGULARISERS)}")


def discriminator_metrics(scores: PairScores) -> dict[str, torch.Tensor]:
    """The metrics that every loss has, over all pairs: `d_acc` is the share of pairs whose teacher is strictly above;
    the standard deviations are over all scores of a side."""
    return {
        "critic/d_acc": (scores.difference > 0).float().mean(),
        "critic/score_diff": scores.difference.mean(),
        "critic/raw_score_diff": (scores.teacher_raw - scores.student_raw).mean(),
        "critic/student_score_mean": scores.student.mean(),
        "critic/teacher_score_mean": scores.teacher.mean(),
        "critic/student_score_std": scores.student.std(correction=0),
        "critic/teacher_score_std": scores.teacher.std(correction=0),
    }


def compute_discriminator_loss(
    student_vpreds: torch.Tensor,
    teacher_vpreds: torch.Tensor,
    response_mask: torch.Tensor,
    teacher_response_mask: torch.Tensor,
    *,
    loss: str = "ranking",
    pooling: str | None = None,
    adaptive_temperature: bool = False,
    **constants: Any,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The discriminator's loss in its flat form: student and teacher rows paired one to one.

    Args:
        student_vpreds, teacher_vpreds: values per token, (R, T) each (the two T may differ).
        response_mask, teacher_response_mask: (R, T) masks of the tokens that count.
        loss: a registered name.
        pooling: `last_token`, `mean` or `sum`; by default what the loss was made for, and the sum for `bradley_terry`,
            whose first version summed over the mask.
        adaptive_temperature: take `adapted_temperature` of these pairs for the loss's `temperature`.
        constants: the loss's own, e.g. `margin`.

    Returns:
        the scalar loss and a dict of floats under the trainer's metric names.
    """
    spec = get_discriminator_loss_fn(loss)
    pooling = pooling or ("sum" if loss == "bradley_terry" else spec.pooling)
    scores = PairScores.pool(student_vpreds, teacher_vpreds, response_mask, teacher_response_mask, pooling)
    if adaptive_temperature:
        constants["temperature"] = adapted_temperature(scores.difference.mean().item())
    value, parts = spec(scores, **constants)
    metrics = {
        "critic/d_loss": value,
        **parts,
        **discriminator_metrics(scores),
        "critic/student_value_mean": masked_mean(student_vpreds, response_mask),
        "critic/teacher_value_mean": masked_mean(teacher_vpreds, teacher_response_mask),
    }
    return value, {name: metric.item() for name, metric in metrics.items()}
