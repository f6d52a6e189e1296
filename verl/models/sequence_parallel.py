"""Sequence parallelism: the packed tokens of one micro-batch over several ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

N ranks of a group have the same rows. Each computes every N-th of their S packed tokens, its *shard*, (L = S / N,
rounded up): prompts, answers and what a head computes so are spread evenly, whatever their lengths. Only attention
needs the whole sequence. Before it an all-to-all turns shards of all heads into all tokens of H / N heads, behind it
another turns them back, and in between attention is what it is on one rank, for a part of the heads. Layers that carry
a state along a row (`row_mixers.py`) get the whole sequence on every rank.

Everything that travels does so by one collective, `_exchange`, whose gradient is itself: gradients are those of the sum
of all ranks' losses, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Shard:
    """One rank's place among the `size` ranks of a group."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The shard (L, ...) of a sequence (S, ...); zeros stand for the tokens that are missing at its end."""
        return _padded(whole, self.size)[self.rank :: self.size]

    def holds(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each of some tokens, given by their places in S, is in the shard."""
        return tokens % self.size == self.rank

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """The places in the shard of tokens that it holds, given by their places in S."""
        return tokens // self.size

    def whole(self, own: torch.Tensor, tokens: int) -> torch.Tensor:
        """The sequence (S, ...) of all ranks' shards (L, ...)."""
        return _interleaved(_exchange(own.expand(self.size, *own.shape), self), tokens)

    def sum(self, own: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors."""
        return _exchange(own.expand(self.size, *own.shape), self).sum(0)

    def heads(self, per_head: torch.Tensor) -> torch.Tensor:
        """This rank's part of something that each head has one of, (H,)."""
        return per_head.view(self.size, -1)[self.rank]

    def tokens_to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens of this rank's heads, query (S, H / N, E) and key, value (S, J', E), of the shards (L, H, E) and
        (L, J, E).

        Where N does not divide the J key heads each is repeated as often as it has to be, so that every rank has those
        of its query heads.

        Raises:
            ValueError: N does not divide H.
        """
        check_heads(query.shape[1], self.size)
        repeats = 1
        while key.shape[1] * repeats % self.size:
            repeats += 1
        if repeats > 1:
            key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        parts = [states.reshape(len(states), self.size, -1) for states in (query, key, value)]
        received = _exchange(torch.cat(parts, dim=-1).transpose(0, 1), self)
        widths = [part.shape[-1] for part in parts]
        query, key, value = (
            _interleaved(part, tokens).unflatten(-1, (-1, states.shape[-1]))
            for part, states in zip(received.split(widths, dim=-1), (query, key, value), strict=True)
        )
        return query, key, value

    def heads_to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """The shard (L, H, E) of all heads, of all tokens of this rank's heads (S, H / N, E)."""
        padded = _padded(output.flatten(1), self.size)
        received = _exchange(padded.view(-1, self.size, padded.shape[-1]).transpose(0, 1), self)
        return received.transpose(0, 1).reshape(received.shape[1], -1, output.shape[-1])


def _exchange(parts: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What each rank of the group has for this one, (N, ...), in their order; `parts` is what this one has for them."""
    return all_to_all_single_autograd(parts.contiguous(), None, None, shard.group)


def _interleaved(shards: torch.Tensor, tokens: int) -> torch.Tensor:
    """The sequence (S, ...) of its shards (N, L, ...)."""
    return shards.transpose(0, 1).reshape(-1, *shards.shape[2:])[:tokens]


def _padded(whole: torch.Tensor, size: int) -> torch.Tensor:
    """A sequence (S, ...) with zeros behind it, as many as make its length a multiple of `size`."""
    return F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, -len(whole) % size))


def own_shard(size: int) -> Shard | None:
    """This rank's shard among every `size` successive ranks; None where each has its sequences for itself. Collective.

    Raises:
        ValueError: the ranks do not divide into groups of that size.
    """
    if size == 1:
        return None
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks % size:
        raise ValueError(f"expected a number of ranks that divides into groups of {size}, got {ranks}")
    return Shard(dist.get_rank() % size, size, _group(dist.group.WORLD, size))


@cache
def _group(world: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """One group for all models of a process: each has communicators of its own on a GPU, which take memory."""
    return dist.new_subgroups(size)[0]


def check_heads(heads: int, size: int) -> None:
    """ValueError where `size` ranks cannot share `heads` query heads evenly."""
    if heads % size:
        raise ValueError(
            f"its {heads} attention heads cannot be shared by {size} ranks: expected an ulysses_sequence_parallel_size "
            "that divides their number"
        )


def check_shared_heads(config: PretrainedConfig, size: int) -> None:
    """`check_heads` of a model, as its config counts them; where it does not, its first forward will tell."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int):
        check_heads(heads, size)
