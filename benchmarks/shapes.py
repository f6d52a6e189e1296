"""Model shapes, the floating-point operations they need, and the time that a device takes for them at least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from verl.models import shape as flops
from verl.models.shape import Limits

BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model: `tied` models use the embedding as their LM head."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def body_parameters(self) -> int:
        """Everything but the embedding and the LM head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (self.hidden + 1) * (queries + 2 * keys) + queries * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """All of them, a tied embedding once."""
        return self.body_parameters + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16_BYTES


SHAPES = {
    shape.name: shape
    for shape in (
        # For smoke tests on CPU.
        Shape("tiny", 128, 2, 4, 2, 256, 512, tied=True),
        # SmolLM2's sizes, with Qwen2's biases.
        Shape("135m", 576, 30, 9, 3, 1536, 49152, tied=True),
        # Qwen2.5's.
        Shape("0.5b", 896, 24, 14, 2, 4864, 151936, tied=True),
        Shape("1.5b", 1536, 28, 12, 2, 8960, 151936, tied=True),
        Shape("3b", 2048, 36, 16, 2, 11008, 151936, tied=True),
        Shape("7b", 3584, 28, 28, 4, 18944, 152064, tied=False),
    )
}


def attention_flops(shape: Shape, lengths: Iterable[int], repeated: Iterable[int] = ()) -> float:
    """See `verl.models.shape`."""
    return flops.attention_flops(shape.layers, shape.heads * shape.head_dim, lengths, repeated)


def training_flops(shape: Shape, lengths: Iterable[int], repeated: Iterable[int] = ()) -> float:
    """See `verl.models.shape`."""
    return flops.training_flops(shape.parameters, shape.layers, shape.heads * shape.head_dim, lengths, repeated)


def training_flops_done(
    shape: Shape, lengths: Iterable[int], head_tokens: int, head_width: int, repeated: Iterable[int] = ()
) -> float:
    """The same with the head counted where it is applied, and the embedding, which is a look-up, not at all.

    Args:
        head_tokens: tokens that the head sees, the answers'.
        head_width: its outputs: the vocabulary of a policy, 1 of a discriminator.
    """
    lengths, repeated = list(lengths), list(repeated)
    linear = shape.body_parameters * (sum(lengths) - sum(repeated)) + shape.hidden * head_width * head_tokens
    return 6.0 * linear + 3 * attention_flops(shape, lengths, repeated)


def decode_limit_seconds(shape: Shape, limits: Limits, contexts: list[int], new_tokens: int, at_once: int) -> float:
    """The least time in which `new_tokens` can be generated behind each context, `at_once` sequences at a time.

    A step reads the weights once and every sequence's keys and values, and multiplies: 2 N operations a sequence for
    the weights and, in each layer, 4 H d for every token attended to. It takes the longer of bytes / bandwidth and
    operations / rate. Reading the prompts (prefill) is left out. The embedding's look-up reads next to nothing.
    """
    weights = shape.body_parameters + shape.vocab * shape.hidden
    seconds = 0.0
    for start in range(0, len(contexts), at_once):
        together = contexts[start : start + at_once]
        for step in range(new_tokens):
            attended = sum(together) + len(together) * (step + 1)
            moved = BF16_BYTES * weights + attended * shape.kv_bytes_per_token
            flops = 2 * weights * len(together) + 4 * attended * shape.heads * shape.head_dim * shape.layers
            seconds += max(moved / limits.bandwidth, flops / limits.flops)
    return seconds


def push_limit_seconds(shape: Shape, limits: Limits) -> float:
    """The least time to give an engine on the same device bf16 weights: 2 N bytes read and 2 N written."""
    return 2 * BF16_BYTES * shape.parameters / limits.bandwidth
