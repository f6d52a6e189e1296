"""Attention over packed rows: the one place that knows which kernel runs.

Registered with transformers as `verl_packed`; the rows' layout travels to it as keyword arguments of the model's
forward (`packing.Layout`).

On a GPU, in bf16 or fp16, PyTorch's flash-attention kernels run over the packed tokens. Everywhere else the tokens are
spread over a right-padded grid of whole rows and SDPA runs causally on it: with the padding behind the tokens, a causal
row never sees any, so no mask is built. Only attention is padded and repeats prompts; projections, MLPs and heads run
on each token once.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from verl.models.packing import Layout

PACKED_ATTENTION = "verl_packed"
# Arguments that some families pass and that change nothing here: positions are in the keys already, and nothing is
# cached, dropped out or returned besides.
WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
)
LAYOUT = tuple(field.name for field in fields(Layout))
# The types that the flash-attention kernels compute in, and the head sizes that they have code for.
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_LARGEST_HEAD, FLASH_HEAD_STEP = 256, 8


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: query (1, H, S, E), key and value (1, J, S, E) with H a multiple of J.

    Args:
        arguments: the fields of `packing.Layout`; and what else the model passes.

    Returns:
        (1, S, H, E) and None, as transformers expects of an attention function.

    Raises:
        ValueError: the model asks for attention of another kind: a mask, capped scores, sinks, a window that a row can
            reach, or anything unknown. Or it does not pass on the layout.
    """
    if any(name not in arguments for name in LAYOUT):
        raise ValueError("its layers do not pass on to attention where rows begin and end")
    layout = Layout(**{name: arguments.pop(name) for name in LAYOUT})
    _refuse({"attention_mask": attention_mask, **arguments}, layout.width)
    states = [packed[0].transpose(0, 1) for packed in (query, key, value)]
    if _has_kernel(query) and value.shape[-1] == query.shape[-1]:
        output = _Flash.apply(
            *states, layout.starts, layout.longest, layout.prompt_tokens, layout.prompt_starts, layout.longest_prompt,
            layout.answer_tokens, layout.answer_starts, layout.longest_answers, scaling,
        )  # fmt: skip
    else:
        output = _on_grid(*states, layout.source, layout.place, layout.rows, layout.width, scaling)
    return output.unsqueeze(0), None


def _refuse(arguments: dict[str, object], longest: int) -> None:
    for name, value in arguments.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name == "sliding_window" and (not isinstance(value, int) or value >= longest):
            continue
        if (name == "dropout" and value == 0) or (name == "is_causal" and value is True):
            continue
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise ValueError(f"packed rows attend to all that is before them, which leaves out {name}={shown}")


def _has_kernel(query: torch.Tensor) -> bool:
    size = query.shape[-1]
    fits = size <= FLASH_LARGEST_HEAD and size % FLASH_HEAD_STEP == 0
    return query.is_cuda and query.dtype in FLASH_TYPES and fits


def _on_grid(query, key, value, source: torch.Tensor, place: torch.Tensor, rows: int, width: int, scaling: float):
    groups = query.shape[1] // key.shape[1]

    def grid(packed: torch.Tensor, repeat: int) -> torch.Tensor:
        cells = packed.index_select(0, source).view(rows, width, *packed.shape[1:])
        return cells.repeat_interleave(repeat, dim=2).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        grid(query, 1), grid(key, groups), grid(value, groups), is_causal=True, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, place)


# ---------------------------------------------------------------------------------------------------------------------
# Flash attention, with prompts that several answers share
#
# An answer's tokens attend to each other causally, and to all of the prompt: two sets of keys. Attention over a union
# is the mean of attention over its parts, weighted by the exponentials of their log-sums, so each part runs by itself.
# Backwards, the kernel derives the probabilities from the log-sums that it is given: with those of the union, each
# part's call gives that part's share of the gradient of the whole.
#
# The kernels are opaque to the compiler; what is between them it fuses.
# ---------------------------------------------------------------------------------------------------------------------


class _Flash(torch.autograd.Function):
    """Output (S, H, E) of query (S, H, E) and key, value (S, J, E); the rest as in `packing.Layout`."""

    @staticmethod
    def forward(
        ctx, query, key, value, starts, longest, prompt_tokens, prompt_starts, longest_prompt, answer_tokens,
        answer_starts, longest_answers, scaling,
    ):  # fmt: skip
        output, log_sums = _flash(query, key, value, starts, starts, longest, longest, True, scaling)
        if answer_tokens:
            prompts, answers = slice(prompt_tokens), slice(prompt_tokens, prompt_tokens + answer_tokens)
            other, other_sums = _flash(
                query[answers], key[prompts], value[prompts], answer_starts, prompt_starts, longest_answers,
                longest_prompt, False, scaling,
            )  # fmt: skip
            own_sums = log_sums[:, answers]
            both = torch.logaddexp(own_sums, other_sums)
            own_share, other_share = ((sums - both).exp().T.unsqueeze(-1) for sums in (own_sums, other_sums))
            merged = own_share * output[answers] + other_share * other
            output[answers] = merged.to(output.dtype)
            log_sums[:, answers] = both
        ctx.save_for_backward(query, key, value, output, log_sums, starts, prompt_starts, answer_starts)
        ctx.numbers = longest, prompt_tokens, longest_prompt, answer_tokens, longest_answers, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, log_sums, starts, prompt_starts, answer_starts = ctx.saved_tensors
        longest, prompt_tokens, longest_prompt, answer_tokens, longest_answers, scaling = ctx.numbers
        gradient = gradient.contiguous()
        gradients = _flash_backward(
            gradient, query, key, value, output, log_sums, starts, starts, longest, longest, True, scaling
        )
        if answer_tokens:
            prompts, answers = slice(prompt_tokens), slice(prompt_tokens, prompt_tokens + answer_tokens)
            others = _flash_backward(
                gradient[answers], query[answers], key[prompts], value[prompts], output[answers],
                log_sums[:, answers].contiguous(), answer_starts, prompt_starts, longest_answers, longest_prompt, False,
                scaling,
            )  # fmt: skip
            for whole, part, other in zip(gradients, (answers, prompts, prompts), others, strict=True):
                whole[part] += other
        return *gradients, *[None] * 9


@torch.library.custom_op("verl::flash_attention", mutates_args=())
def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_starts: torch.Tensor, key_starts: torch.Tensor,
    longest_query: int, longest_key: int, causal: bool, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention within segments: the output (tokens, H, E) of query (tokens, H, E) over key and value (keys, J, E), and
    in fp32 the log-sums (H, tokens) of exponentials."""
    return _kernel_forward(query, key, value, query_starts, key_starts, longest_query, longest_key, causal, scaling)


@_flash.register_fake
def _(query, key, value, *layout):
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("verl::flash_attention_backward", mutates_args=())
def _flash_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    log_sums: torch.Tensor, query_starts: torch.Tensor, key_starts: torch.Tensor, longest_query: int, longest_key: int,
    causal: bool, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    return _kernel_backward(
        gradient, query, key, value, output, log_sums, query_starts, key_starts, longest_query, longest_key, causal,
        scaling,
    )  # fmt: skip


@_flash_backward.register_fake
def _(gradient, query, key, value, *rest):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _kernel_forward(query, key, value, query_starts, key_starts, longest_query, longest_key, causal, scaling):
    # Where no segment has more than one query the kernel takes another path, which reads past an empty segment.
    longest_query = max(2, longest_query)
    return torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, key_starts, longest_query, longest_key, 0.0, causal, False, scale=scaling
    )[:2]


def _kernel_backward(
    gradient, query, key, value, output, log_sums, query_starts, key_starts, longest_query, longest_key, causal, scaling
):
    # The random state is dropout's, and there is none.
    dropout = (torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device))
    segments = (query_starts, key_starts, longest_query, longest_key)
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, log_sums, *segments, 0.0, causal, *dropout, scale=scaling
    )


# With a mask function registered beside it, transformers would first read the positions on the host, which waits for
# the device; without one it makes no mask.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def set_attention(hf: PreTrainedModel, name: str) -> None:
    """Switch a model's attention. ValueError where it cannot: transformers would warn and keep the attention it has."""
    hf.set_attn_implementation(name)
    if hf.config._attn_implementation != name:
        raise ValueError(
            f"{type(hf).__name__} does not get its attention from transformers' AttentionInterface, so that it stays "
            f"{hf.config._attn_implementation}"
        )
