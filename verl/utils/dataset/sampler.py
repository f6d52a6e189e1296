"""The rows of each batch: a pure function of the seed and of how many rows came before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class EpochBatches:
    """A batch sampler over one long stream: epoch after epoch, each in an order of its own.

    A batch may reach over the end of an epoch, so no row is left out because rows do not divide into batches. Since
    the order depends on nothing but the seed, a run that resumes after `start` rows goes on as if it had not stopped.

    Args:
        rows: rows of the dataset.
        batch_size: rows per batch.
        batches: how many batches to give.
        seed: of the shuffling; None keeps the file's order.
        start: rows already consumed.

    Raises:
        ValueError: no rows.
    """

    def __init__(self, rows: int, batch_size: int, batches: int, seed: int | None, start: int = 0):
        if rows <= 0:
            raise ValueError("the training data has no rows")
        self.rows = rows
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, np.ndarray] = {}
        for position in range(self.start, self.start + self.batches * self.batch_size, self.batch_size):
            places = range(position, position + self.batch_size)
            wanted = {place // self.rows for place in places}
            orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in wanted}
            yield [int(orders[place // self.rows][place % self.rows]) for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.rows)
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)
