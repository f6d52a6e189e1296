"""Frozen linear layers in 4 bits (QLoRA, arXiv 2305.14314, section 3), by the bitsandbytes library.

A weight (out, in) is taken row after row in blocks of BLOCK numbers. Of each block the largest absolute value a is kept
in fp32, and of each number w the nearest of 16 levels to w / a, in 4 bits: 4.5 bits a number. The levels are NF4's.
Whenever a layer computes, forward or backward, its weight is made of them in the type that the model computes in, and
forgotten again.

Frozen weights get adapters, which PEFT puts beside these layers as beside any linear ones.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.models.adapter_folders import FOUR_BITS
from verl.models.layers import decoder_layers

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK, LEVELS = 64, FOUR_BITS["bnb_4bit_quant_type"]
BITS_PER_WEIGHT = 4 + 32 / BLOCK
# The parameter of a layer that is in 4 bits, in the place of `weight`.
PACKED = "weight_4bit"
# Bytes by which a layer's begin and end, so that they can be seen as numbers of any type.
ALIGNMENT = 16


def require_bitsandbytes(why: str) -> None:
    """ModuleNotFoundError unless bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"{why} needs the bitsandbytes library, which is not installed: pip install 'verl[qlora]'"
        )


class Linear4bit(nn.Linear):
    """A linear layer whose frozen weight is in 4 bits; its bias, if any, is the plain layer's.

    `weight_4bit` is all of the weight: the largest values of the blocks, then the levels, two in a byte. It has the
    type that the model computes in, so that FSDP, which gathers everything in that type, changes none of its bits; what
    they are as numbers means nothing, and may be nan.

    Args:
        dtype: that the model computes in.
        values: whether to take the plain layer's values; otherwise only the memory for them.
    """

    def __init__(self, plain: nn.Linear, dtype: torch.dtype, values: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        count = plain.weight.numel()
        self._blocks, self._bytes = ceil(count / BLOCK), ceil(count / 2)
        size = ceil((4 * self._blocks + self._bytes) / ALIGNMENT) * ALIGNMENT
        packed = torch.empty(size // dtype.itemsize, dtype=dtype, device=plain.weight.device)
        self.register_parameter(PACKED, nn.Parameter(packed, requires_grad=False))
        self.register_parameter("bias", plain.bias)
        if values:
            self._pack(plain.weight.detach())

    def _pack(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        levels, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=LEVELS)
        packed = self.weight_4bit.detach().view(torch.uint8)
        packed.zero_()
        packed[: 4 * self._blocks].view(torch.float32).copy_(state.absmax)
        packed[4 * self._blocks :][: self._bytes].copy_(levels.flatten())

    def _unpacked(self, packed: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
        """The levels and how to make numbers of `dtype` of them, as bitsandbytes has it; nothing is copied."""
        from bitsandbytes.functional import QuantState

        packed = packed.view(torch.uint8)
        largest = packed[: 4 * self._blocks].view(torch.float32)
        shape = torch.Size([self.out_features, self.in_features])
        state = QuantState(largest, shape=shape, blocksize=BLOCK, quant_type=LEVELS, dtype=dtype)
        return packed[4 * self._blocks :][: self._bytes].unsqueeze(1), state

    def dequantized(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) that `packed`, this layer's parameter as a whole, stands for."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self._unpacked(packed.detach(), dtype))

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in) in fp32, made anew; the layer may not be sharded."""
        return self.dequantized(self.weight_4bit, torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        from bitsandbytes import matmul_4bit

        levels, state = self._unpacked(self.weight_4bit, self.weight_4bit.dtype)
        return matmul_4bit(input, levels, state, bias=self.bias)


def is_in_4bit(hf: PreTrainedModel) -> bool:
    """Whether `put_in_4bit` was here."""
    return any(isinstance(layer, Linear4bit) for layer in hf.modules())


def linear_layers(hf: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are put in 4 bits, by their names: linear ones within decoder layers.

    Raises:
        ValueError: there are none.
    """
    within = {id(child) for layer in decoder_layers(hf) for child in layer.modules()}
    found = {name: child for name, child in hf.named_modules() if id(child) in within and type(child) is nn.Linear}
    if not found:
        raise ValueError(
            f"load_in_4bit: {type(hf).__name__} has no linear layers within its decoder layers to be put in 4 bits: "
            "leave it out"
        )
    return found


def put_in_4bit(hf: PreTrainedModel, dtype: torch.dtype, values: bool = True) -> None:
    """Replace a whole model's linear layers within its decoder layers, in place, by such in 4 bits.

    Args:
        dtype, values: see `Linear4bit`.
    """
    for name, plain in linear_layers(hf).items():
        parent, _, own = name.rpartition(".")
        setattr(hf.get_submodule(parent), own, Linear4bit(plain, dtype, values))


def round_to_4bit(hf: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the layers that `put_in_4bit` would replace, in place, the weights that it would make them compute with:
    what adapters were trained beside, in a model without layers in 4 bits. The model is in fp32."""
    for plain in linear_layers(hf).values():
        packed = Linear4bit(plain, dtype, values=True)
        with torch.no_grad():
            plain.weight.copy_(packed.dequantized(packed.weight_4bit, dtype))


def whole_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a linear layer computes with, in 4 bits or not; collective where it is sharded."""
    in_4bit = isinstance(layer, Linear4bit)
    tensor = (layer.weight_4bit if in_4bit else layer.weight).detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return layer.dequantized(tensor, tensor.dtype) if in_4bit else tensor


def quantization_json(dtype: torch.dtype) -> str:
    """base_quantization.json of adapters beside such layers.

    Args:
        dtype: that the model computes in.
    """
    return json.dumps(FOUR_BITS | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
