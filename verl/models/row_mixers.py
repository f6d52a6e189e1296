"""Layers that carry a state along a row: linear attention, state-space layers, short convolutions.

Such a layer reads its input in order, from the left, and would go on from one packed row into the next. So it alone is
run on rows spread over a right-padded grid (`packing.Layout`): the padding is behind the tokens, where nothing looks
back at it. There a shared prompt is computed once for each answer; all else in the model stays packed. Where ranks
share the tokens (`sequence_parallel.py`), each of them runs the layer on all rows, and goes on with its own.

Such modules are told by a convolution of their own over the tokens, which nearly all of them have; one without is found
by the proof, since its rows change each other.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.models.attention import LAYOUT, on_grid
from verl.models.layers import decoder_layers
from verl.models.packing import Layout


def row_mixers(hf: PreTrainedModel) -> list[nn.Module]:
    """The modules of a model's layers that carry a state along a row."""
    modules = (module for layer in decoder_layers(hf) for module in layer.modules())
    return [module for module in modules if any(isinstance(child, nn.Conv1d) for child in module.children())]


def run_on_rows(mixer: nn.Module) -> None:
    """Make the module spread packed rows over a grid, and lay its output end to end again. What is not packed it
    computes as ever."""
    mixer.forward = MethodType(_forward, mixer)


def costs_beside_packing(hf: PreTrainedModel) -> list[str]:
    """What of a model's packed forward costs more than it would in a plain one, a sentence each."""
    costs, layers, mixers = [], decoder_layers(hf), row_mixers(hf)
    if mixers:
        costs.append(
            f"{len(mixers)} of {len(layers)} layers carry a state along a row (linear attention, convolutions): they "
            "compute each micro-batch padded to its longest row, a shared prompt once for each answer, uncompiled, on "
            "every rank that shares its tokens (ulysses_sequence_parallel_size); all else is packed"
        )
    if getattr(hf.config.get_text_config(), "attn_logit_softcapping", None):
        costs.append(
            "its attention scores are capped, for which there is no kernel: attention is computed plainly, in fp32, "
            "row by row, and again in the backward pass; all else is packed"
        )
    return costs


def _forward(self: nn.Module, *inputs: torch.Tensor, **arguments: Any) -> Any:
    if any(name not in arguments for name in LAYOUT):
        return type(self).forward(self, *inputs, **arguments)
    layout = Layout(**{name: arguments.pop(name) for name in LAYOUT})
    packed = inputs[0] if inputs else arguments.pop("hidden_states")
    shard = layout.shard
    tokens = packed[0] if shard is None else shard.whole(packed[0], layout.tokens)
    grid = on_grid(tokens, layout.source, layout.rows, layout.width)
    output = _run(self, grid, *inputs[1:], **arguments)
    mixed, *others = output if isinstance(output, tuple) else (output,)
    mixed = mixed.flatten(0, 1).index_select(0, layout.place)
    mixed = (mixed if shard is None else shard.of(mixed)).unsqueeze(0)
    return (mixed, *others) if isinstance(output, tuple) else mixed


# Its loops over chunks would be unrolled, anew for each length.
@torch.compiler.disable
def _run(mixer: nn.Module, *inputs: torch.Tensor, **arguments: Any) -> Any:
    return type(mixer).forward(mixer, *inputs, **arguments)
