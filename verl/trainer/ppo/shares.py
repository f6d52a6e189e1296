"""Which rank gets which rows of a call, and how they come back: only transport has an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from verl.batch import columns
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions, log_seqlen_unbalance

Result = TypeVar("Result")


@dataclass(frozen=True)
class Shares:
    """Equal work for every rank, and the same mini-batches for any number of them. Ranks that share the tokens of their
    rows are as one here.

    A mini-batch is `mini_batch_size` consecutive rows of the data's order. Each rank's share of it has as many rows as
    the others' and about as many tokens; without `by_tokens` the shares are consecutive rows.
    """

    ranks: int
    by_tokens: bool
    mini_batch_size: int

    def call(
        self, method: Callable[[DataProto], Result], data: DataProto, keys: Sequence[str] = (), **meta: object
    ) -> Result:
        """Call the workers on the columns `keys` of `data` (all, if none is named) with `meta` as meta_info.

        Returns:
            what they answer; a table's rows stand in the order of `data` again.
        """
        order = torch.from_numpy(np.concatenate(self._of(data)[0]))
        rows = (columns(data, keys) if keys else data).select_idxs(order)
        rows.meta_info = meta
        result = method(rows)
        return result.select_idxs(order.argsort()) if isinstance(result, DataProto) else result

    def unbalance(self, data: DataProto) -> dict[str, float]:
        """`global_seqlen/*`: how far the ranks' tokens are apart, and would be in the data's order."""
        shares, lengths = self._of(data)
        return log_seqlen_unbalance(lengths, [share.tolist() for share in shares], "global_seqlen")

    def _of(self, data: DataProto) -> tuple[list[np.ndarray], list[int]]:
        """Each rank's rows, and every row's tokens."""
        lengths = _tokens(data)
        shares: list[list[np.ndarray]] = [[] for _ in range(self.ranks)]
        for start in range(0, len(data), self.mini_batch_size):
            rows = np.arange(start, min(start + self.mini_batch_size, len(data)))
            if self.by_tokens:
                parts = get_seqlen_balanced_partitions([lengths[row] for row in rows], self.ranks, equal_size=True)
            else:
                parts = np.split(np.arange(len(rows)), self.ranks)
            for share, part in zip(shares, parts, strict=True):
                share.append(rows[part])
        return [np.concatenate(share) for share in shares], lengths


def _tokens(data: DataProto) -> list[int]:
    """Tokens to compute for each row: its prompt's once, the teacher's and, where there are any, the students'."""
    tokens = data.batch["teacher_attention_mask"].sum(-1)
    if "response_mask" in data.batch:
        tokens = tokens + data.batch["response_mask"].sum((1, 2))
    return tokens.tolist()
