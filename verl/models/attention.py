"""Attention over packed rows: the one place that knows which kernel runs.

Registered with transformers as `verl_packed`; the rows' layout travels to it as keyword arguments of the model's
forward (`packing.Layout`).

On a GPU, in bf16 or fp16, PyTorch's flash-attention kernels run over the packed tokens (`flash.py`), with windows and
sinks. Everywhere else the tokens are spread over a right-padded grid of whole rows and SDPA runs causally on it: with
the padding behind the tokens, a causal row never sees any. Capped scores, and sinks without the kernels, which SDPA
does not know, are computed plainly on the same grid (`capped_attention.py`). Only attention is padded and repeats
prompts; projections, MLPs and heads run on each token once.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from verl.models.capped_attention import band, capped_attention
from verl.models.flash import flash, has_kernel
from verl.models.packing import Layout

PACKED_ATTENTION = "verl_packed"
# Arguments that some families pass and that change nothing here: positions are in the keys already, and nothing is
# cached, dropped out or returned besides.
WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
)
LAYOUT = tuple(field.name for field in fields(Layout))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: query (1, H, S, E), key and value (1, J, S, E) with H a multiple of J. Of a
    shard of the tokens, in place of S, the same (`sequence_parallel.py`).

    Args:
        sliding_window: the last tokens that each attends to, itself among them.
        softcap: scores become softcap tanh(scores / softcap).
        s_aux: (H,) sinks: scores of one more key of each head, whose value is zero.
        arguments: the fields of `packing.Layout`; and what else the model passes.

    Returns:
        (1, S, H, E) and None, as transformers expects of an attention function.

    Raises:
        ValueError: the model asks for attention of another kind: a mask, or anything unknown, or a window that rows
            were not packed for. Or it does not pass on the layout, or the heads cannot be shared by a shard's ranks.
    """
    if any(name not in arguments for name in LAYOUT):
        raise ValueError("its layers do not pass on to attention where rows begin and end")
    layout = Layout(**{name: arguments.pop(name) for name in LAYOUT})
    _refuse({"attention_mask": attention_mask, **arguments})
    window = _reached(sliding_window, layout)
    states, shard = [packed[0].transpose(0, 1) for packed in (query, key, value)], layout.shard
    if shard is not None:
        states = shard.tokens_to_heads(*states, layout.tokens)
        s_aux = None if s_aux is None else shard.heads(s_aux)
    if softcap is None and has_kernel(states[0], states[2]):
        output = flash(*states, layout, scaling, window, s_aux)
    else:
        output = _on_grid(
            *states, layout.source, layout.place, layout.rows, layout.width, scaling, window, softcap, s_aux
        )
    return (output if shard is None else shard.heads_to_tokens(output)).unsqueeze(0), None


def _refuse(arguments: dict[str, object]) -> None:
    for name, value in arguments.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if (name == "dropout" and value == 0) or (name == "is_causal" and value is True):
            continue
        shown = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        raise ValueError(f"packed rows attend to all that is before them, which leaves out {name}={shown}")


def _reached(window: object, layout: Layout) -> int:
    """The window, or 0 where no row is longer."""
    if not isinstance(window, int) or window >= layout.width:
        return 0
    if window != layout.window:
        raise ValueError(f"rows were packed for a window of {layout.window} tokens, and a layer has one of {window}")
    return window


def on_grid(packed: torch.Tensor, source: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """States of S tokens, (S, ...), spread over right-padded rows, (rows, width, ...); see `packing.Layout`."""
    return packed.index_select(0, source).view(rows, width, *packed.shape[1:])


def _on_grid(
    query, key, value, source: torch.Tensor, place: torch.Tensor, rows: int, width: int, scaling: float,
    window: int = 0, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    query, key, value = (on_grid(packed, source, rows, width).transpose(1, 2) for packed in (query, key, value))
    if softcap is None and sinks is None:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        kind = {"attn_mask": band(width, window, query.device)} if window else {"is_causal": True}
        output = F.scaled_dot_product_attention(query, key, value, scale=scaling, **kind)
    else:
        output = capped_attention(query, key, value, sinks, scaling, softcap or 0.0, window)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, place)


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
