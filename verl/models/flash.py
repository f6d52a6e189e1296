"""Flash attention over packed rows, with prompts that several answers share, windows and sinks.

An answer's tokens attend to each other causally, and to all of the prompt: two sets of keys. Attention over a union
is the mean of attention over its parts, weighted by the exponentials of their log-sums, so each part runs by itself.
Backwards, the kernel derives the probabilities from the log-sums that it is given: with those of the union, each
part's call gives that part's share of the gradient of the whole.

A sink is one more key of every token, with a score that is learned for each head, and a value of zero: a part like
another, whose output is nothing.

In a layer whose window a row exceeds an answer sees the end of its prompt alone. Those keys are copied before its own
(`packing.Layout`), and one call with the kernel's own window does it.

The kernels are opaque to the compiler; what is between them it fuses.
"""

from __future__ import annotations

import torch

from verl.models.packing import Layout

# The types that the kernels compute in, and the head sizes that they have code for.
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_LARGEST_HEAD, FLASH_HEAD_STEP = 256, 8


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is a kernel for the device, type and head size."""
    size = query.shape[-1]
    fits = size <= FLASH_LARGEST_HEAD and size % FLASH_HEAD_STEP == 0 and value.shape[-1] == size
    return query.is_cuda and query.dtype in FLASH_TYPES and fits


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float,
    window: int = 0, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention inside each row: the output (S, H, E) of query (S, H, E) and key, value (S, J, E).

    Args:
        window: the last tokens that each attends to, itself among them; 0 is all. The layout was made for it.
        sinks: (H,) scores of the heads' sinks.
    """
    if not window:
        return _Flash.apply(
            query, key, value, sinks, layout.starts, layout.longest, layout.prompt_tokens, layout.prompt_starts,
            layout.longest_prompt, layout.answer_tokens, layout.answer_starts, layout.longest_answers, scaling,
        )  # fmt: skip
    # Without shared prompts the keys are the tokens.
    keys = (layout.window_keys, layout.window_starts, layout.longest_window)
    keys = keys if layout.answer_tokens else (None, None, layout.longest)
    return _FlashWindow.apply(query, key, value, sinks, layout.starts, layout.longest, *keys, scaling, window)


class _Flash(torch.autograd.Function):
    """Output (S, H, E) of query (S, H, E) and key, value (S, J, E); the rest as in `packing.Layout`."""

    @staticmethod
    def forward(
        ctx, query, key, value, sinks, starts, longest, prompt_tokens, prompt_starts, longest_prompt, answer_tokens,
        answer_starts, longest_answers, scaling,
    ):  # fmt: skip
        output, log_sums = _flash(query, key, value, starts, starts, longest, longest, True, scaling, 0)
        if answer_tokens:
            prompts, answers = slice(prompt_tokens), slice(prompt_tokens, prompt_tokens + answer_tokens)
            other, other_sums = _flash(
                query[answers], key[prompts], value[prompts], answer_starts, prompt_starts, longest_answers,
                longest_prompt, False, scaling, 0,
            )  # fmt: skip
            own_sums = log_sums[:, answers]
            both = torch.logaddexp(own_sums, other_sums)
            own_share, other_share = ((sums - both).exp().T.unsqueeze(-1) for sums in (own_sums, other_sums))
            merged = own_share * output[answers] + other_share * other
            output[answers] = merged.to(output.dtype)
            log_sums[:, answers] = both
        output, log_sums = _with_sinks(output, log_sums, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sums, starts, prompt_starts, answer_starts)
        ctx.numbers = longest, prompt_tokens, longest_prompt, answer_tokens, longest_answers, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, sinks, output, log_sums, starts, prompt_starts, answer_starts = ctx.saved_tensors
        longest, prompt_tokens, longest_prompt, answer_tokens, longest_answers, scaling = ctx.numbers
        gradient = gradient.contiguous()
        gradients = _flash_backward(
            gradient, query, key, value, output, log_sums, starts, starts, longest, longest, True, scaling, 0
        )
        if answer_tokens:
            prompts, answers = slice(prompt_tokens), slice(prompt_tokens, prompt_tokens + answer_tokens)
            others = _flash_backward(
                gradient[answers], query[answers], key[prompts], value[prompts], output[answers],
                log_sums[:, answers].contiguous(), answer_starts, prompt_starts, longest_answers, longest_prompt, False,
                scaling, 0,
            )  # fmt: skip
            for whole, part, other in zip(gradients, (answers, prompts, prompts), others, strict=True):
                whole[part] += other
        return *gradients, _sinks_gradient(gradient, output, log_sums, sinks), *[None] * 9


class _FlashWindow(torch.autograd.Function):
    """The same within a window. `index` (keys,) says which token each key of a segment is, and `key_starts` where each
    segment's begin; None: the keys are the tokens."""

    @staticmethod
    def forward(
        ctx, query, key, value, sinks, starts, longest, index, key_starts, longest_keys, scaling, window
    ):  # fmt: skip
        segments = (starts, starts if index is None else key_starts, longest, longest_keys, True, scaling, window)
        output, log_sums = _flash(query, _picked(key, index), _picked(value, index), *segments)
        output, log_sums = _with_sinks(output, log_sums, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sums, starts, index, key_starts)
        ctx.numbers = longest, longest_keys, True, scaling, window
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, sinks, output, log_sums, starts, index, key_starts = ctx.saved_tensors
        gradient = gradient.contiguous()
        segments = (starts, starts if index is None else key_starts, *ctx.numbers)
        grad_query, *others = _flash_backward(
            gradient, query, _picked(key, index), _picked(value, index), output, log_sums, *segments
        )
        if index is not None:
            others = [_summed(other, index, len(key)) for other in others]
        return grad_query, *others, _sinks_gradient(gradient, output, log_sums, sinks), *[None] * 7


def _picked(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return states if index is None else states.index_select(0, index)


def _summed(copies: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each token's sum over its copies, summed in fp32 at least."""
    wide = torch.promote_types(copies.dtype, torch.float32)
    total = copies.new_zeros(tokens, *copies.shape[1:], dtype=wide)
    return total.index_add_(0, index, copies.to(wide)).to(copies.dtype)


def _with_sinks(
    output: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sums with a sink among the keys of each head."""
    if sinks is None:
        return output, log_sums
    both = torch.logaddexp(log_sums, sinks.to(log_sums.dtype).unsqueeze(-1))
    return (output * (log_sums - both).exp().T.unsqueeze(-1)).to(output.dtype), both


def _sinks_gradient(
    gradient: torch.Tensor, output: torch.Tensor, log_sums: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor | None:
    """(H,): of a key with probability p and value 0, d score = p (0 - sum(dO O)), over all tokens."""
    if sinks is None:
        return None
    probabilities = (sinks.to(log_sums.dtype).unsqueeze(-1) - log_sums).exp()
    inner = (gradient.to(log_sums.dtype) * output.to(log_sums.dtype)).sum(-1).T
    return -(probabilities * inner).sum(-1).to(sinks.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@torch.library.custom_op("verl::flash_attention", mutates_args=())
def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_starts: torch.Tensor, key_starts: torch.Tensor,
    longest_query: int, longest_key: int, causal: bool, scaling: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention within segments: the output (tokens, H, E) of query (tokens, H, E) over key and value (keys, J, E), and
    in fp32 the log-sums (H, tokens) of exponentials. Where it is causal a segment's last query is at its last key."""
    return _kernel_forward(
        query, key, value, query_starts, key_starts, longest_query, longest_key, causal, scaling, window
    )


@_flash.register_fake
def _(query, key, value, *layout):
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("verl::flash_attention_backward", mutates_args=())
def _flash_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    log_sums: torch.Tensor, query_starts: torch.Tensor, key_starts: torch.Tensor, longest_query: int, longest_key: int,
    causal: bool, scaling: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    return _kernel_backward(
        gradient, query, key, value, output, log_sums, query_starts, key_starts, longest_query, longest_key, causal,
        scaling, window,
    )  # fmt: skip


@_flash_backward.register_fake
def _(gradient, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _kernel_forward(query, key, value, query_starts, key_starts, longest_query, longest_key, causal, scaling, window):
    # Where no segment has more than one query the kernel takes another path, which reads past an empty segment.
    longest_query = max(2, longest_query)
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, key_starts, longest_query, longest_key, 0.0, causal, False, scale=scaling,
        **_window(window),
    )[:2]  # fmt: skip


def _kernel_backward(
    gradient, query, key, value, output, log_sums, query_starts, key_starts, longest_query, longest_key, causal,
    scaling, window,
):  # fmt: skip
    # The random state is dropout's, and there is none.
    dropout = (torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device))
    segments = (query_starts, key_starts, longest_query, longest_key)
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, log_sums, *segments, 0.0, causal, *dropout, scale=scaling,
        **_window(window),
    )  # fmt: skip


def _window(window: int) -> dict[str, int]:
    """The kernel's arguments: how many keys before and after its own a query attends to."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}
