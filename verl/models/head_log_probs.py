"""Log-probs and entropies straight from hidden states: the LM head, without a float copy of its logits.

K tokens, D hidden size, V vocabulary. The logits of K tokens are the largest tensor of a training step. Here they exist
once, in the model's type, while memory has room for them; the backward pass turns them into their own gradient in
place. Where there is no room, and where no gradient is wanted, they are made chunk by chunk, and made again in the
backward pass. Whatever the type of the logits, what is computed from them is computed in fp32, scales and caps of a
family's own among it.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from verl.models.logits import PLAIN_LOGITS, LogitForm

Entropy = Literal["none", "value", "grad"]
# Bytes of the logits of one chunk: far more than keeps a GPU busy, far less than it has.
CHUNK_BYTES = 2**30
# On a CPU the free memory is not known: logits up to this many bytes are kept.
KEPT_ON_CPU = 2**30


def head_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    temperature: float | torch.Tensor = 1.0, entropy: Entropy = "none", form: LogitForm = PLAIN_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """log softmax(logits / temperature)[target] and the entropy of that distribution, in nats.

    Args:
        hidden: (K, D).
        weight: (V, D), with an optional bias (V,).
        targets: (K,), integers in [0, V).
        temperature: one for all tokens, or one each, (K,).
        entropy: not computed (None is returned), its value only, or differentiable.
        form: how logits are made of the head's output.

    Returns:
        (K,) each, in fp32 (fp64 for fp64 inputs).
    """
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    scale = 1.0 / temperature
    settings = (
        scale.unsqueeze(-1) if isinstance(scale, torch.Tensor) else scale,
        entropy != "none",
        trains and _has_room(hidden, weight),
        form,
    )
    log_probs, entropies = _HeadLogProbs.apply(hidden, weight, bias, targets, *settings)
    if entropy == "none":
        return log_probs, None
    return log_probs, entropies if entropy == "grad" else entropies.detach()


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, with_entropy: bool, keeps: bool, form: LogitForm):
        statistics, kept = [], None
        for part in _chunks(hidden, weight, whole=keeps):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            statistics.append(_on(logits, _statistics)(logits, targets[part], _part(scale, part), with_entropy, form))
            kept = logits if keeps else None
        log_probs, log_sums, entropies = (torch.cat(parts) for parts in zip(*statistics, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums, entropies)
        ctx.logits, ctx.scale, ctx.with_entropy, ctx.form = kept, scale, with_entropy, form
        return log_probs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropies):
        hidden, weight, bias, targets, log_sums, entropies = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None
        grad_hidden = torch.empty_like(hidden)
        grad_weight = grad_bias = None
        for part in _chunks(hidden, weight, whole=kept is not None):
            logits = torch.nn.functional.linear(hidden[part], weight, bias) if kept is None else kept
            known = (targets[part], log_sums[part], entropies[part], grad_log_probs[part], grad_entropies[part])
            logits = _on(logits, _gradient)(logits, *known, _part(ctx.scale, part), ctx.with_entropy, ctx.form)
            torch.mm(logits, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                grad_weight = _sum_of_chunks(grad_weight, logits.T @ hidden[part], last=part.stop >= len(hidden))
            if ctx.needs_input_grad[2]:
                grad_bias = _sum_of_chunks(grad_bias, logits.sum(0), last=part.stop >= len(hidden))
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor, scale: float | torch.Tensor, with_entropy: bool, form: LogitForm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of the targets, log of the sum of exponentials, and entropies (zeros if not wanted), (K,) each."""
    scaled = form.of(_wide(logits)) * scale
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp()
    total = weights.sum(-1)
    log_sums = top.squeeze(-1) + total.log()
    log_probs = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_sums
    if not with_entropy:
        return log_probs, log_sums, torch.zeros_like(log_sums)
    # -sum p log p, with log p = (scaled - top) - log(total).
    return log_probs, log_sums, total.log() - (weights * (scaled - top)).sum(-1) / total


def _gradient(
    logits: torch.Tensor, targets: torch.Tensor, log_sums: torch.Tensor, entropies: torch.Tensor,
    grad_log_probs: torch.Tensor, grad_entropies: torch.Tensor, scale: float | torch.Tensor, with_entropy: bool,
    form: LogitForm,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the head's output, (K, V), over that output, which `logits` is.

    d log p_t / d z_j = [j = t] - p_j, and d H / d z_j = -p_j (log p_j + H), with z the scaled logits.
    """
    formed = form.of(_wide(logits))
    log_p = formed * scale - log_sums.unsqueeze(-1)
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
    gradient = grad_log_probs.unsqueeze(-1) * (is_target.to(log_p.dtype) - log_p.exp())
    if with_entropy:
        gradient = gradient - grad_entropies.unsqueeze(-1) * log_p.exp() * (log_p + entropies.unsqueeze(-1))
    return logits.copy_(gradient * scale * form.slope(formed))


def _part(scale: float | torch.Tensor, part: slice) -> float | torch.Tensor:
    """A scale for all tokens, or the part's own, (K, 1)."""
    return scale[part] if isinstance(scale, torch.Tensor) else scale


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, whole: bool) -> list[slice]:
    """All rows at once, or as many as make CHUNK_BYTES of logits."""
    rows = len(hidden) if whole else CHUNK_BYTES // (weight.shape[0] * hidden.element_size())
    step = max(1, rows)
    return [slice(start, min(start + step, len(hidden))) for start in range(0, max(1, len(hidden)), step)]


def _has_room(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the logits may be kept: they and as much again must be free."""
    needed = len(hidden) * weight.shape[0] * hidden.element_size()
    if not hidden.is_cuda:
        return needed <= KEPT_ON_CPU
    free, _ = torch.cuda.mem_get_info(hidden.device)
    unused = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
    return 2 * needed <= free + unused


def _sum_of_chunks(total: torch.Tensor | None, part: torch.Tensor, last: bool) -> torch.Tensor:
    """`total` + `part` in fp32, and back in the part's own type with the last one; a single part as it is."""
    if total is None:
        return part if last else _wide(part)
    total += part
    return total.to(part.dtype) if last else total


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _on(tensor: torch.Tensor, function):
    """The function, fused into a kernel or two where the tensor is on a GPU: logits are read, not copied."""
    return _compiled(function) if tensor.is_cuda else function
