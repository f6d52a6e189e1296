"""The decoder layers of a model, and how they run: compiled, or computed again in the backward pass."""

from __future__ import annotations

from math import ceil

import torch
from torch import nn
from transformers import PreTrainedModel

# Guards that differ between models and modes (a frozen or a trained model, with or without gradients, a policy or a
# discriminator of another size, a layer with a window or without) each take a graph of the same layer code, and so
# does a micro-batch in which no prompt is shared, or no row exceeds the window, or a section of it (see
# `packing.Layout`) has a single token. Other lengths take none.
RECOMPILE_LIMIT = 64


def decoder_layers(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks, which FSDP shards one by one."""
    classes = set(hf._no_split_modules or [])
    return [child for child in hf.modules() if type(child).__name__ in classes]


def is_recomputed(layer: nn.Module) -> bool:
    """Whether `recompute_layers` chose the layer."""
    return getattr(layer, "gradient_checkpointing", False)


def compile_layers(hf: PreTrainedModel) -> None:
    """Fuse what lies between the matrix products of each layer. All layers share their graphs.

    Only `forward` is compiled: FSDP's and checkpointing's hooks around it stay Python. Shapes are symbols, so that
    micro-batches of every length run on the same few graphs.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in decoder_layers(hf):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def recompute_layers(hf: PreTrainedModel, share: float) -> None:
    """Checkpoint this share of the layers: keep only their inputs and recompute everything else inside them in the
    backward pass.

    The layers are spread evenly over the depth, the first among them: the last one's turn to be computed again comes
    when everything else is still in memory.
    """
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(decoder_layers(hf)):
        layer.gradient_checkpointing = ceil((number + 1) * share) > ceil(number * share)
