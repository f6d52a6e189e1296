"""Attention over packed rows: the one place that knows which kernel runs.

Registered with transformers as `verl_packed`; the rows' layout travels to it as keyword arguments of the model's
forward. On CPU the packed tokens are spread over a right-padded grid and SDPA runs causally on it: with the padding
behind the tokens, a causal row never sees any, so no mask is built. Only attention is padded; projections, MLPs and
heads run on real tokens alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

PACKED_ATTENTION = "verl_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    pad_index: torch.Tensor,
    rows: int,
    longest: int,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: query (1, H, S, D), key and value (1, G, S, D) with H a multiple of G.

    Returns:
        (1, S, H, D) and None, as transformers expects of an attention function.
    """
    groups = query.shape[1] // key.shape[1]

    def grid(packed: torch.Tensor, repeat: int) -> torch.Tensor:
        heads_last = packed[0].repeat_interleave(repeat, dim=0).transpose(0, 1)
        flat = heads_last.new_zeros(rows * longest, *heads_last.shape[1:])
        return flat.index_copy(0, pad_index, heads_last).view(rows, longest, *heads_last.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        grid(query, 1), grid(key, groups), grid(value, groups), is_causal=True, scale=scaling, dropout_p=dropout
    )
    return output.transpose(1, 2).flatten(0, 1)[pad_index].unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)


def check_full_attention(config: PretrainedConfig) -> None:
    """ValueError when a layer attends through a sliding window, which packed rows do not honour."""
    windowed = getattr(config, "sliding_window", None) is not None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"packed training supports full attention, but {config.model_type} has layers of kind {sorted(kinds)}; "
            "use a model without sliding-window layers, or use_remove_padding=False"
        )
