"""Tiny models of families with windows, caps, sinks and linear attention, with windows that short rows exceed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.tiny import SIZES
from verl.models.loading import as_discriminator, find_class

WINDOW = 8
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
HEADS = {"head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}
# Caps that scores of a few units feel.
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN3_NEXT = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FAMILIES = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, HEADS | SLIDING | CAPS),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, HEADS | SLIDING | {"query_pre_attn_scalar": 8}),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, HEADS | SLIDING | EXPERTS | {"num_local_experts": 4}),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, SLIDING),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": WINDOW}),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, HEADS | LINEAR | EXPERTS | QWEN3_NEXT),
    "qwen3_5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, HEADS | LINEAR),
}


def recent(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random language model of the family, in fp32, with norms that are not one and sinks and biases not zero."""
    config_class, model_class, entries = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **ENDS, **entries, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def recent_scorer(family: str, seed: int = 3) -> PreTrainedModel:
    """A random discriminator of the family, in fp32."""
    config = recent(family).config
    as_discriminator(config)
    torch.manual_seed(seed)
    return find_class(config, "score")(config).eval()


def builder(family: str) -> Callable[[], PreTrainedModel]:
    """`recent` of the family, without arguments."""
    return lambda: recent(family)
