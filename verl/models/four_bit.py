"""Frozen linear layers in 4 bits (QLoRA, arXiv 2305.14314, section 3), by the bitsandbytes library.

A weight (out, in) is taken row after row in blocks of BLOCK numbers. Of each block the largest absolute value a is kept
in fp32, and of each number w the nearest of 16 levels to w / a, in 4 bits: 4.5 bits a number. The levels are NF4's.
Whenever a layer computes, forward or backward, its weight is made of them in the type that the model computes in, and
forgotten again.

Every rank has all of these bytes. FSDP2 would gather them as numbers: torch 2.11 has no shards of bytes, and where
bytes pass for numbers in bf16, its copies on GPUs make one and the same nan of each that looks like one
(pytorch/pytorch#159333).
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
# A multiple of so many bytes is where the largest values begin, as kernels may want it.
ALIGNMENT = 16


def require_bitsandbytes(why: str) -> None:
    """ModuleNotFoundError unless bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"{why} needs the bitsandbytes library, which is not installed: pip install 'verl[qlora]'"
        )


class Linear4bit(nn.Linear):
    """A linear layer whose frozen weight is in 4 bits; its bias, if any, is the plain layer's.

    `weight_4bit` has the bytes of the whole weight: the levels, two in a byte, then the largest values of the blocks.

    Args:
        dtype: that the model computes in.
        values: whether to take the plain layer's values; otherwise only the memory for them.
    """

    def __init__(self, plain: nn.Linear, dtype: torch.dtype, values: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.compute_dtype = dtype
        count = plain.weight.numel()
        self._bytes, self._blocks = ceil(count / 2), ceil(count / BLOCK)
        self._place = ceil(self._bytes / ALIGNMENT) * ALIGNMENT
        packed = torch.empty(self._place + 4 * self._blocks, dtype=torch.uint8, device=plain.weight.device)
        self.register_parameter(PACKED, nn.Parameter(packed, requires_grad=False))
        self.register_parameter("bias", plain.bias)
        if values:
            self._pack(plain.weight.detach())

    def _pack(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        levels, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=LEVELS)
        packed = self.weight_4bit.detach()
        packed[: self._bytes].copy_(levels.flatten())
        packed[self._bytes : self._place].zero_()
        packed[self._place :].view(torch.float32).copy_(state.absmax)

    def _unpacked(self, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
        """The levels and how to make numbers of `dtype` of them, as bitsandbytes has it; nothing is copied."""
        from bitsandbytes.functional import QuantState

        largest = self.weight_4bit[self._place :].view(torch.float32)
        shape = torch.Size([self.out_features, self.in_features])
        state = QuantState(largest, shape=shape, blocksize=BLOCK, quant_type=LEVELS, dtype=dtype)
        return self.weight_4bit[: self._bytes].unsqueeze(1), state

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in), made anew."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self._unpacked(dtype))

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in) in fp32, made anew."""
        return self.dequantized(torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(input, *self._unpacked(self.compute_dtype), bias=self.bias)


def is_in_4bit(hf: PreTrainedModel) -> bool:
    """Whether `put_in_4bit` was here."""
    return any(isinstance(layer, Linear4bit) for layer in hf.modules())


def linear_layers(hf: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are put in 4 bits, by their names: linear ones within decoder layers, adapters' own apart.

    Raises:
        ValueError: there are none.
    """
    within = {id(child) for layer in decoder_layers(hf) for child in layer.modules()}
    found = {
        name: child
        for name, child in hf.named_modules()
        if id(child) in within and type(child) is nn.Linear and ".lora_" not in name
    }
    if not found:
        raise ValueError(
            f"load_in_4bit: {type(hf).__name__} has no linear layers within its decoder layers to be put in 4 bits: "
            "leave it out"
        )
    return found


def put_in_4bit(hf: PreTrainedModel, dtype: torch.dtype, values: bool = True) -> None:
    """Replace a whole model's linear layers within its decoder layers, in place, by such in 4 bits, those that adapters
    are beside too.

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
        with torch.no_grad():
            plain.weight.copy_(Linear4bit(plain, dtype, values=True).dequantized(dtype))


def whole_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that a linear layer computes with, in 4 bits or not; collective where it is sharded."""
    if isinstance(layer, Linear4bit):
        return layer.dequantized(layer.compute_dtype)
    tensor = layer.weight.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def quantization_json(dtype: torch.dtype) -> str:
    """base_quantization.json of adapters beside such layers.

    Args:
        dtype: that the model computes in.
    """
    return json.dumps(FOUR_BITS | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
