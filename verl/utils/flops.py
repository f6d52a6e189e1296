"""Floating-point operations of training, and what devices can do. Every number is worked out on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
    """Forward pass of causal attention over sequences of these lengths, less that over prompts which are `repeated`:
    computed once for several sequences that begin with them. `width` is heads times head size.

    In one layer QK^T multiplies an (L, d) by a (d, L) matrix for each of H heads, 2 L^2 H d operations (a
    multiplication and an addition each), and PV as many again: 4 L^2 H d. A causal query sees half of the keys, so half
    of it is work: 2 L^2 H d. (The exact share is (L + 1) / 2L.)
    """
    squares = sum(2 * length**2 for length in lengths) - sum(2 * length**2 for length in repeated)
    return float(squares * width * layers)


def training_flops(
    parameters: int, layers: int, width: int, lengths: Iterable[int], repeated: Iterable[int] = ()
) -> float:
    """Forward and backward pass by the usual convention: 6 N T + causal attention.

    Every parameter takes part in one multiplication and one addition per token, 2 N T; the backward pass makes two such
    products, one for the gradient of the inputs and one for that of the weights: 6 N T in all, and three times the
    forward attention. N counts all parameters, a tied embedding once, and T all real tokens, the prompts' included and
    padding never. Recomputed activations and tokens forwarded twice are not work by this count, and neither is a prompt
    that one sequence has from another, as `repeated` lists them.
    """
    lengths, repeated = list(lengths), list(repeated)
    tokens = sum(lengths) - sum(repeated)
    return 6.0 * parameters * tokens + 3 * attention_flops(layers, width, lengths, repeated)
