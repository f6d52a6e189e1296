"""Causal attention with capped scores and sinks, computed plainly: for what neither SDPA nor the flash kernels know.

R rows, H query heads, J key heads, W tokens of a row, E head size. In fp32, one row at a time and again in the backward
pass, so that the scores of one row, (H, W, W), are in memory, up to `COPIES` of them, and not those of a micro-batch.

With raw scores s and cap c the scores are z = c tanh(s / c), and dz/ds = 1 - (z / c)^2. A sink is one more key with a
score of its own and the value zero.
"""

from __future__ import annotations

import torch

# Tensors as large as a row's scores that are in memory at once: in the backward pass scores, probabilities and what
# their gradient is made of.
COPIES = 3


def band(width: int, window: int, device: torch.device) -> torch.Tensor:
    """(width, width) bool: whether a token attends to another; to itself and, within `window` tokens, to those before
    it. A window of 0 is none."""
    places = torch.arange(width, device=device)
    back = places.unsqueeze(-1) - places
    return (back >= 0) & (back < window) if window else back >= 0


def capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, scaling: float,
    softcap: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """Output (R, H, W, E) of query (R, H, W, E) and key, value (R, J, W, E).

    Args:
        sinks: (H,) or None.
        softcap, window: 0 is none.
    """
    if sinks is None:
        sinks = query.new_full((query.shape[1],), -torch.inf)
    return _Capped.apply(query, key, value, sinks, scaling, softcap, window)


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, scaling, softcap, window):
        output, log_sums = _forward(query, key, value, sinks, scaling, softcap, window)
        ctx.save_for_backward(query, key, value, sinks, output, log_sums)
        ctx.numbers = scaling, softcap, window
        return output

    @staticmethod
    def backward(ctx, gradient):
        return *_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.numbers), None, None, None


# Opaque to the compiler, which would unroll the rows.


@torch.library.custom_op("verl::capped_attention", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, scaling: float, softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output, and the log-sums (R, H, W) of the exponentials of all scores, the sink's among them."""
    output = torch.empty(query.shape[:-1] + value.shape[-1:], dtype=query.dtype, device=query.device)
    log_sums = query.new_empty(query.shape[:-1], dtype=_wide(query).dtype)
    seen = band(query.shape[2], window, query.device)
    for row in range(len(query)):
        scores = _scores(query[row], key[row], scaling, softcap).masked_fill_(~seen, -torch.inf)
        sums = torch.logaddexp(scores.logsumexp(-1), _wide(sinks).view(*scores.shape[:2], 1))
        output[row] = (scores.sub_(sums.unsqueeze(-1)).exp_() @ _wide(value[row]).unsqueeze(1)).flatten(0, 1)
        log_sums[row] = sums.flatten(0, 1)
    return output, log_sums


@_forward.register_fake
def _(query, key, value, sinks, scaling, softcap, window):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=wide)


@torch.library.custom_op("verl::capped_attention_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor,
    output: torch.Tensor, log_sums: torch.Tensor, scaling: float, softcap: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key, value and sinks: with p the probabilities, dz = p (dO V^T - sum(dO O))."""
    grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
    inner = (_wide(gradient) * _wide(output)).sum(-1)
    grad_sinks = -((_wide(sinks).unsqueeze(-1) - log_sums).exp() * inner).sum((0, 2))
    seen = band(query.shape[2], window, query.device)
    groups = (key.shape[1], -1)
    for row in range(len(query)):
        scores = _scores(query[row], key[row], scaling, softcap)
        weights = (scores - log_sums[row].unflatten(0, groups).unsqueeze(-1)).exp_().masked_fill_(~seen, 0)
        above = _wide(gradient[row]).unflatten(0, groups)
        grad_value[row] = (weights.mT @ above).sum(1)
        weights *= (above @ _wide(value[row]).unsqueeze(1).mT).sub_(inner[row].unflatten(0, groups).unsqueeze(-1))
        if softcap:
            # What the scores are no longer needed for, in their place.
            weights *= scores.div_(softcap).square_().neg_().add_(1)
        weights *= scaling
        grad_query[row] = (weights @ _wide(key[row]).unsqueeze(1)).flatten(0, 1)
        grad_key[row] = (weights.mT @ _wide(query[row]).unflatten(0, groups)).sum(1)
    return grad_query, grad_key, grad_value, grad_sinks.to(sinks.dtype)


@_backward.register_fake
def _(gradient, query, key, value, sinks, *rest):
    return tuple(torch.empty_like(states) for states in (query, key, value, sinks))


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float) -> torch.Tensor:
    """Scores (J, H / J, W, W) of one row's query (H, W, E) and key (J, W, E), capped."""
    scores = (_wide(query).unflatten(0, (len(key), -1)) @ _wide(key).unsqueeze(1).mT).mul_(scaling)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
