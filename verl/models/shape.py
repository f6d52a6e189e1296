"""A model's sizes, the floating-point operations of training it, and what devices can do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from verl.models.adapters import add_adapters
from verl.models.four_bit import linear_layers
from verl.models.layers import decoder_layers
from verl.models.loading import Kind, empty_model

if TYPE_CHECKING:
    from peft import LoraConfig


def count_parameters(
    config: PretrainedConfig, kind: Kind, trust_remote_code: bool = False, adapters: LoraConfig | None = None
) -> int:
    """The trained parameters of the model that `config` describes, tied ones once: all, or with `adapters` these and a
    score head. It is built without memory for weights."""
    with torch.device("meta"):
        hf = empty_model(config, kind, trust_remote_code)
        if adapters is not None:
            add_adapters(hf, adapters)
    return sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class ModelShape:
    """The sizes on which memory and arithmetic depend."""

    parameters: int  # tied ones once
    layer_parameters: int  # of the largest decoder layer
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    normed_heads: bool  # queries and keys are normalised once more
    capped_scores: bool = False  # those of attention (see `capped_attention`)
    frozen: int = 0  # of the parameters, beside adapters, which are among them
    packed: int = 0  # of the frozen, in 4 bits (see `four_bit`)

    @property
    def trained(self) -> int:
        """Parameters that have gradients and optimizer states."""
        return self.parameters - self.frozen

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        kind: Kind,
        trust_remote_code: bool = False,
        adapters: LoraConfig | None = None,
        in_4bit: bool = False,
    ) -> ModelShape:
        """The sizes of the model that `config` describes, with `adapters` if it has some, beside weights `in_4bit` if
        they are; it is built without memory for its weights."""
        with torch.device("meta"):
            hf = empty_model(config, kind, trust_remote_code)
            packed = sum(layer.weight.numel() for layer in linear_layers(hf).values()) if in_4bit else 0
            if adapters is not None:
                add_adapters(hf, adapters)
        text = config.get_text_config()
        layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(hf)]
        return cls(
            parameters=sum(p.numel() for p in hf.parameters()),
            layer_parameters=max(layers, default=0),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            # Where a family does not say: what it then does.
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            normed_heads=any("q_norm" in name for name, _ in hf.named_parameters()),
            capped_scores=bool(getattr(text, "attn_logit_softcapping", None)),
            frozen=0 if adapters is None else sum(p.numel() for p in hf.parameters() if not p.requires_grad),
            packed=packed,
        )


@dataclass(frozen=True)
class Limits:
    """Datasheet rates: dense bf16 operations per second, and bytes of device memory per second."""

    flops: float
    bandwidth: float


# By the name that CUDA gives. A device that is not here gets no ratio to its limit.
LIMITS = {
    "NVIDIA H200": Limits(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Limits(989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Limits(312e12, 2.039e12),
}


def attention_flops(layers: int, width: int, lengths: Iterable[int], repeated: Iterable[int] = ()) -> float:
    """Operations of the forward pass of causal attention over sequences of these lengths, without those over `repeated`
    prompts, which are computed once for several sequences that begin with them. `width` is heads times head size.

    In one layer QK^T multiplies an (L, d) by a (d, L) matrix for each of H heads, 2 L^2 H d operations (a
    multiplication and an addition each), and PV as many again: 4 L^2 H d. A causal query sees half of the keys, so half
    of it is work: 2 L^2 H d. (The exact share is (L + 1) / 2L.)
    """
    squares = sum(2 * length**2 for length in lengths) - sum(2 * length**2 for length in repeated)
    return float(squares * width * layers)


def training_flops(
    parameters: int, layers: int, width: int, lengths: Iterable[int], repeated: Iterable[int] = (), frozen: int = 0
) -> float:
    """Operations of a forward and a backward pass by the usual convention: 6 N T + causal attention.

    Of the parameters, `frozen` ones have no gradient of their own, which takes 2 N T off for them.

    Every parameter takes part in one multiplication and one addition per token, 2 N T; the backward pass makes two such
    products, one for the gradient of the inputs and one for that of the weights: 6 N T in all, and three times the
    forward attention. N counts all parameters, a tied embedding once, and T all real tokens, the prompts' included and
    padding never. Recomputed activations and tokens forwarded twice are not work by this count, and neither is a prompt
    that one sequence has from another, as `repeated` lists them.
    """
    lengths, repeated = list(lengths), list(repeated)
    tokens = sum(lengths) - sum(repeated)
    return (6.0 * parameters - 2.0 * frozen) * tokens + 3 * attention_flops(layers, width, lengths, repeated)
