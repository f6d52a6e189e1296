"""Attention over packed rows: the one place that knows which kernel runs.

Registered with transformers as `verl_packed`; the rows' layout travels to it as keyword arguments of the model's
forward (`PackedRows.layout`).

On a GPU it is `torch.nn.attention.varlen.varlen_attn`, a flash-attention kernel over the packed tokens, in bf16 or
fp16. Everywhere else the packed tokens are spread over a right-padded grid and SDPA runs causally on it: with the
padding behind the tokens, a causal row never sees any, so no mask is built. Only attention is padded; projections,
MLPs and heads run on real tokens alone.
"""

from __future__ import annotations

from inspect import signature

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig

PACKED_ATTENTION = "verl_packed"
# What the flash-attention kernel behind varlen_attn computes in; head sizes above 256 it has no code for.
VARLEN_TYPES = (torch.bfloat16, torch.float16)
VARLEN_LARGEST_HEAD = 256
# torch 2.11 takes fewer key and value heads than query heads without a word, later versions want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    starts: torch.Tensor,
    pad_index: torch.Tensor,
    rows: int,
    longest: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: query (1, H, S, D), key and value (1, G, S, D) with H a multiple of G.

    Returns:
        (1, S, H, D) and None, as transformers expects of an attention function.
    """
    if query.is_cuda and query.dtype in VARLEN_TYPES and query.shape[-1] <= VARLEN_LARGEST_HEAD:
        return _varlen(query, key, value, starts, longest, scaling), None
    return _on_grid(query, key, value, pad_index, rows, longest, scaling), None


def _varlen(query, key, value, starts: torch.Tensor, longest: int, scaling: float) -> torch.Tensor:
    packed = (states[0].transpose(0, 1) for states in (query, key, value))
    output = varlen_attn(*packed, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), **GROUPED)
    return output.unsqueeze(0)


def _on_grid(query, key, value, pad_index: torch.Tensor, rows: int, longest: int, scaling: float) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]

    def grid(packed: torch.Tensor, repeat: int) -> torch.Tensor:
        heads_last = packed[0].repeat_interleave(repeat, dim=0).transpose(0, 1)
        flat = heads_last.new_zeros(rows * longest, *heads_last.shape[1:])
        return flat.index_copy(0, pad_index, heads_last).view(rows, longest, *heads_last.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        grid(query, 1), grid(key, groups), grid(value, groups), is_causal=True, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1)[pad_index].unsqueeze(0)


# With a mask function registered beside it, transformers would first read the positions on the host, which waits for
# the device; without one it makes no mask.
AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def check_full_attention(config: PretrainedConfig) -> None:
    """ValueError when a layer attends through a sliding window, which packed rows do not honour."""
    windowed = getattr(config, "sliding_window", None) is not None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"packed training supports full attention, but {config.model_type} has layers of kind {sorted(kinds)}; "
            "use a model without sliding-window layers, or use_remove_padding=False"
        )
