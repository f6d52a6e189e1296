"""A model's small twin: the same class from the same config, narrow and shallow, with weights that hide nothing.

What a class computes beside attention and head (scales, caps, sinks, windows, routing) stands in its config and stays
as it is; only sizes shrink. A twin is built in a fraction of a second, in fp32 on CPU, wherever the model itself will
run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

Entries = dict[str, Any]

# Sizes that entries of a config get if they are larger, by the end of their names.
HEADS, HEAD_DIM, WIDTH, VOCABULARY, LAYERS = 4, 16, 64, 300, 4
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(num_hidden_layers|num_layers|n_layers?|(de|en)coder_layers|num_(de|en)coder_layers|num_blocks)", LAYERS),
    (r"mamba_(n|num)_heads", 2 * WIDTH // HEAD_DIM),
    (r"(attention_heads|num_heads|n_heads?|num_(key|value)_heads|num_attention_heads_per_layer)", HEADS),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(head_?dim|d_head|d_kv|kv_channels|head_size|dim_head)", HEAD_DIM),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|d_inner|n_inner|dim_ff|mlp_dim|intermediate_size_mlp)", 32),
    (r"(^hidden_size|d_model|n_embd|(^|_)embed_dim|embedding_size|emb(edding)?_dim|^dim|lru_width)", WIDTH),
    (r"(word_embed_proj_dim|attention_hidden_size)", WIDTH),
    (r"(num_experts|num_local_experts|n_routed_experts)", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k)", 2),
    (r"(n_group|num_expert_group)", 2),
    (r"(topk_group|first_k_dense_replace|attn_layer_offset)", 1),
    (r"attn_layer_period", 2),
    (r"(lora_rank|dt_rank|time_step_rank|lowrank)", 16),
    (r"(d_state|state_size)", 16),
)
KEY_VALUE_HEADS = re.compile(r"(num_key_value_heads|num_kv_heads|kv_n_heads)$")
ATTENTION_HEADS = re.compile(r"(num_attention_heads|num_heads|n_heads?|attention_heads)$")
TOKEN = re.compile(r"_token_(id|index)$")
# Entries that a row may be too long for.
REACH = re.compile(r"^(?!.*layers).*(window|chunk|max_position_embeddings)")


def small_config(config: PretrainedConfig, changes: Mapping[str, int] | None = None) -> PretrainedConfig:
    """The config with small sizes. Every entry named in `changes`, however deep, is replaced by its value there.

    Whatever `from_dict` raises where sizes do not fit together.
    """
    entries = copy.deepcopy(config.to_dict())
    _shrink(entries)
    for place, key in _places(entries):
        if key in (changes or {}):
            place[key] = changes[key]
    return type(config).from_dict(entries)


def small_twin(
    build: Callable[[PretrainedConfig], PreTrainedModel],
    config: PretrainedConfig,
    changes: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """A twin built from `small_config` with random weights, every parameter among them: norms are not one and biases
    not zero. The process's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(small_config(config, changes)).float().eval()
        head = getattr(model.get_output_embeddings(), "weight", None)
        with torch.no_grad():
            for parameter in model.parameters():
                size = 0.1 if parameter.dim() < 2 else (3.0 if parameter is head else 1.0) / parameter.shape[-1] ** 0.5
                parameter.add_(size * torch.randn(parameter.shape))
    return model.requires_grad_(False)


def own_config(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that a class is built from: its text's where that is the class's, and the whole is not."""
    text = config.get_text_config()
    belongs = isinstance(text, model_class.config_class or ()) and not isinstance(config, model_class.config_class)
    return text if belongs else config


def reach_entries(config: PretrainedConfig) -> dict[str, int]:
    """The entries that rows may be too long for: windows, chunks, numbers of positions; of equal names the smallest."""
    found: dict[str, int] = {}
    for place, key in _places(config.to_dict()):
        value = place[key]
        if REACH.search(key) and type(value) is int and value > 0:
            found[key] = min(value, found.get(key, value))
    return found


def sliding_window(config: PretrainedConfig) -> int:
    """Tokens that a token attends to in layers with a sliding window, itself among them; 0 without such layers."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if _size(window) else 0


def positions_change_with_length(config: PretrainedConfig) -> bool:
    """Whether rotary positions follow the longest row of a batch."""
    kinds = [place[key] for place, key in _places(config.to_dict()) if key in ("rope_type", "type")]
    return "longrope" in kinds or "dynamic" in kinds


def special_tokens(config: PretrainedConfig) -> set[int]:
    """Token ids that the config names: padding, ends, places of pictures."""
    found: set[int] = set()
    for place, key in _places(config.to_dict()):
        if TOKEN.search(key):
            value = place[key]
            found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
    return found


def _places(entries: Entries) -> Iterator[tuple[Entries, str]]:
    """Every entry, and those of the configs and dictionaries within, as (dictionary, key)."""
    for key, value in list(entries.items()):
        if isinstance(value, dict):
            yield from _places(value)
        elif isinstance(key, str):
            yield entries, key


def _shrink(entries: Entries) -> None:
    """Make sizes small, in place, and those of the configs within."""
    heads = max((value for key, value in entries.items() if ATTENTION_HEADS.search(key) and _size(value)), default=0)
    _shrink_rope(entries, heads)
    depth = next((value for key, value in entries.items() if re.search(SIZES[1][0] + "$", key) and _size(value)), 0)
    kept = _kept_layers(entries, depth)
    for key, value in list(entries.items()):
        if key == "per_layer_config" and isinstance(value, dict):
            layers = {int(layer): settings for layer, settings in value.items()}
            entries[key] = {place: layers[layer] for place, layer in enumerate(kept) if layer in layers}
            for settings in entries[key].values():
                _shrink(settings)
        elif isinstance(value, dict):
            if not key.startswith("rope") and all(isinstance(name, str) for name in value):
                _shrink(value)
        elif isinstance(value, list) and len(value) == depth > 0:
            entries[key] = [_small(key, value[layer], heads) for layer in kept]
        elif key in ("mlp_only_layers", "moe_layers", "full_attn_idxs") and isinstance(value, list):
            entries[key] = [place for place, layer in enumerate(kept) if layer in value]
        elif re.search(SIZES[1][0] + "$", key) and _size(value):
            entries[key] = len(kept)
        else:
            entries[key] = _small(key, value, heads)


def _size(value: Any) -> bool:
    return type(value) is int and value > 0


def _small(key: str, value: Any, heads: int) -> Any:
    if TOKEN.search(key):
        # Tokens beyond the small vocabulary become the first one.
        if isinstance(value, list):
            return [token if token < VOCABULARY else 0 for token in value]
        return value if not _size(value) or value < VOCABULARY else 0
    if not _size(value):
        return value
    if KEY_VALUE_HEADS.search(key):
        return HEADS if value >= heads else min(value, 2)
    for pattern, size in SIZES:
        if re.search(f"({pattern})$", key):
            return min(value, size)
    return value


def _kept_layers(entries: Entries, depth: int) -> list[int]:
    """The first layers, and after them the first of each other kind; lists of one entry per layer tell kinds apart."""
    lists = [value for value in entries.values() if isinstance(value, list) and len(value) == depth]
    kinds = [str([values[layer] for values in lists]) for layer in range(depth)]
    firsts = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    return sorted({*range(min(depth, 2 if len(firsts) > 1 else LAYERS)), *firsts.values()})[: 2 * LAYERS]


def _shrink_rope(entries: Entries, heads: int) -> None:
    """Cut the lists of factors, one for each frequency, to the number that the small head has."""
    own, hidden, heads = entries.get("head_dim"), entries.get("hidden_size") or 0, max(1, heads)
    width = own or hidden // heads
    small = min(own, HEAD_DIM) if own else min(hidden, WIDTH) // min(heads, HEADS)
    for name in ("rope_parameters", "rope_scaling"):
        rope = entries.get(name)
        for key, value in (rope or {}).items() if isinstance(rope, dict) else ():
            if key in ("long_factor", "short_factor") and isinstance(value, list) and width:
                rope[key] = value[: max(1, len(value) * small // width)]
