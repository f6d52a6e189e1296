"""Tensor helpers: masked statistics, log-probs, padding, learning-rate schedules.

Torch only: no Ray, no FSDP, no config object. Shapes: B rows, T tokens, V vocabulary. Masks hold 0 and 1 and have the
shape of the values they go with; what stands under a 0 never reaches a result, not even when it is nan or inf.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Truncation = Literal["left", "right", "middle", "error"]


# ---------------------------------------------------------------------------------------------------------------------
# Masked statistics


def masked_sum(values: torch.Tensor, mask: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Sum of the values where the mask is 1, over everything or over one axis."""
    kept = torch.where(mask.bool(), values, torch.zeros_like(values))
    return kept.sum() if axis is None else kept.sum(dim=axis)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Mean of the values where the mask is 1, over everything or over one axis; 0 where the mask is empty."""
    count = mask.sum() if axis is None else mask.sum(dim=axis)
    return masked_sum(values, mask, axis) / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs and entropy


def _log_softmax_fp32(logits: torch.Tensor) -> torch.Tensor:
    # bf16 has 8 bits of mantissa: a log-softmax over a vocabulary of 150k in it is off in the first decimal.
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[label], computed in fp32 at least, whatever the type of the logits.

    Args:
        logits: (..., V).
        labels: (...), integers in [0, V). There is no ignored index: mask afterwards.

    Returns:
        (...) in fp32 (fp64 for fp64 logits).
    """
    return _log_softmax_fp32(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits), (..., V) -> (...), in fp32 at least; a logit of -inf contributes 0."""
    log_probs = _log_softmax_fp32(logits)
    # 0 * -inf would be nan in the value and in the gradient; the lowest finite number gives the true limit, 0.
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, padding, truncation


def get_response_mask(
    response_ids: torch.Tensor, eos_token: int | Sequence[int] = 2, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """(B, T) generated ids -> (B, T) mask: 1 up to and including the first EOS (any of several), 0 after it.

    A row without EOS is all ones: only for rows where everything was generated, never for already padded text.
    """
    eos_ids = [eos_token] if isinstance(eos_token, int) else list(eos_token)
    is_eos = torch.isin(response_ids, torch.tensor(eos_ids, dtype=response_ids.dtype, device=response_ids.device))
    eos_before = is_eos.long().cumsum(dim=-1) - is_eos.long()
    return (eos_before == 0).to(dtype)


def pad_2d_list_to_length(
    response: Sequence[Sequence[int]], pad_token_id: int, max_length: int | None = None
) -> torch.Tensor:
    """Right-pads B lists of ids to (B, max_length), or to the longest one when `max_length` is None.

    Raises:
        ValueError: a list is longer than `max_length` (nothing is cut here).
    """
    longest = max((len(ids) for ids in response), default=0)
    length = longest if max_length is None else max_length
    if longest > length:
        raise ValueError(f"a list of {longest} ids does not fit max_length={length}: truncate it first")
    rows = [list(ids) + [pad_token_id] * (length - len(ids)) for ids in response]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def pad_sequence_to_length(
    tensors: torch.Tensor, max_seq_len: int, pad_token_id: int | float, left_pad: bool = False
) -> torch.Tensor:
    """Pads the last axis: (..., T) -> (..., max_seq_len), on the right or on the left.

    Raises:
        ValueError: T is larger than `max_seq_len` (nothing is cut here).
    """
    missing = max_seq_len - tensors.shape[-1]
    if missing < 0:
        raise ValueError(f"{tensors.shape[-1]} tokens do not fit max_seq_len={max_seq_len}: truncate them first")
    return F.pad(tensors, (missing, 0) if left_pad else (0, missing), value=pad_token_id)


def _truncate(tokens: torch.Tensor, max_length: int, truncation: Truncation) -> torch.Tensor:
    """(B, T) with T > max_length -> (B, max_length)."""
    length = tokens.shape[-1]
    if truncation == "left":
        return tokens[:, length - max_length :]
    if truncation == "right":
        return tokens[:, :max_length]
    if truncation == "middle":
        head = max_length // 2
        tail = max_length - head
        return torch.cat([tokens[:, :head], tokens[:, length - tail :]], dim=-1)
    if truncation == "error":
        raise ValueError(
            f"{length} tokens are more than max_length={max_length}: raise the limit, shorten the text, "
            "or truncate (left, right or middle)"
        )
    raise ValueError(f"truncation={truncation!r} is not one of left, right, middle, error")


def postprocess_data(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_length: int,
    pad_token_id: int,
    left_pad: bool = True,
    truncation: Truncation = "error",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brings ids and mask from (B, T) to exactly (B, max_length).

    `truncation` names the side that is cut: "left" keeps the last tokens, "right" the first, "middle" the first
    max_length // 2 and the last of the rest; "error" refuses. Padding gets mask 0.

    Raises:
        ValueError: the shapes differ or are not (B, T), or T > max_length with truncation="error" or an unknown one.
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be (B, T)"
        )
    if input_ids.shape[-1] > max_length:
        return _truncate(input_ids, max_length, truncation), _truncate(attention_mask, max_length, truncation)
    return (
        pad_sequence_to_length(input_ids, max_length, pad_token_id, left_pad),
        pad_sequence_to_length(attention_mask, max_length, 0, left_pad),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Learning-rate schedules. `step` counts the scheduler's steps from 0. A warmup begins at 1 / steps of the rate: an
# update at rate 0 would be a batch for nothing.


def _with_linear_warmup(num_warmup_steps: int, after: Callable[[int], float]) -> Callable[[int], float]:
    """Factor (step + 1) / num_warmup_steps below `num_warmup_steps`, then `after(steps since the warmup)`."""

    def factor(step: int) -> float:
        return (step + 1) / num_warmup_steps if step < num_warmup_steps else after(step - num_warmup_steps)

    return factor


def _cosine_factor(progress: float, min_lr_ratio: float, num_cycles: float) -> float:
    """min + (1 - min) (1 + cos(2 pi num_cycles progress)) / 2, progress limited to 1 so that the rate stays down."""
    cosine = 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * min(progress, 1.0)))
    return min_lr_ratio + (1.0 - min_lr_ratio) * cosine


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """Linear up to the optimizer's rate in `num_warmup_steps`, constant from then on."""
    return LambdaLR(optimizer, _with_linear_warmup(num_warmup_steps, lambda _: 1.0), last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Linear warmup, then a cosine down to `min_lr_ratio` of the rate at `num_training_steps`, and constant after it.

    Cosine annealing as in Loshchilov and Hutter 2017 (SGDR, eq. 5); `num_cycles` 0.5 is its half period.
    """
    decay_steps = max(1, num_training_steps - num_warmup_steps)

    def after(step: int) -> float:
        return _cosine_factor(step / decay_steps, min_lr_ratio, num_cycles)

    return LambdaLR(optimizer, _with_linear_warmup(num_warmup_steps, after), last_epoch)


def get_wsd_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    stable_ratio: float = 0.9,
) -> LambdaLR:
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM, section 4), with a cosine decay.

    After the linear warmup, `stable_ratio` of the remaining steps run at the full rate, and the rest decays to
    `min_lr_ratio` of it at `num_training_steps`.
    """
    remaining_steps = max(0, num_training_steps - num_warmup_steps)
    stable_steps = int(remaining_steps * stable_ratio)
    decay_steps = max(1, remaining_steps - stable_steps)

    def after(step: int) -> float:
        return _cosine_factor(max(0, step - stable_steps) / decay_steps, min_lr_ratio, num_cycles)

    return LambdaLR(optimizer, _with_linear_warmup(num_warmup_steps, after), last_epoch)


# ---------------------------------------------------------------------------------------------------------------------
# Names of verl's that nothing here calls


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Variance of all values where the mask is 1, a scalar; with `unbiased` divided by n - 1 (Bessel), else by n.

    Raises:
        ValueError: fewer than two values (one, if not `unbiased`) are under the mask.
    """
    count = int(mask.sum())
    degrees = count - 1 if unbiased else count
    if degrees < 1:
        raise ValueError(f"the variance (unbiased={unbiased}) needs more than {count} value(s) under the mask")
    centred = values - masked_mean(values, mask)
    return masked_sum(centred.square(), mask) / degrees


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Values scaled to unit (unbiased) variance under the mask, moved to zero mean unless `shift_mean` is False.

    Positions outside the mask are scaled along with the rest: mask the result before using it.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def clip_by_value(x: torch.Tensor, tensor_min: torch.Tensor | float, tensor_max: torch.Tensor | float) -> torch.Tensor:
    """`x` limited elementwise to [tensor_min, tensor_max]; the two limits are both numbers or both tensors."""
    return torch.clamp(x, tensor_min, tensor_max)
