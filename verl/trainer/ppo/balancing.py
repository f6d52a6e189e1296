"""The order of a batch's rows: equal work for every rank, and the same mini-batches for any number of them."""

from __future__ import annotations

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions, log_seqlen_unbalance


def balance(batch: DataProto, mini_batch_size: int, ranks: int, by_tokens: bool) -> tuple[DataProto, dict[str, float]]:
    """Order rows so that each rank's share of every mini-batch has about as many tokens as the others'.

    A mini-batch is the same set of rows for any number of ranks: `mini_batch_size` consecutive rows of the data's
    order, which the column `data_order` keeps. Without `by_tokens` the shares are consecutive rows.

    Returns:
        the reordered batch, and `global_seqlen/*`.
    """
    if "data_order" in batch.batch:
        batch = batch.select_idxs(batch.batch["data_order"].argsort())
    batch.batch["data_order"] = torch.arange(len(batch))
    lengths = _tokens(batch)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(batch), mini_batch_size):
        rows = np.arange(start, min(start + mini_batch_size, len(batch)))
        parts = np.split(np.arange(len(rows)), ranks)
        if by_tokens:
            parts = get_seqlen_balanced_partitions([lengths[row] for row in rows], ranks, equal_size=True)
        for share, part in zip(shares, parts, strict=True):
            share.extend(rows[part].tolist())
    return batch.select_idxs(np.concatenate(shares)), log_seqlen_unbalance(lengths, shares, "global_seqlen")


def _tokens(batch: DataProto) -> list[int]:
    """Tokens to compute for each row: its prompt's once, the teacher's and, where there are any, the students'."""
    tokens = batch.batch["teacher_attention_mask"].sum(-1)
    if "response_mask" in batch.batch:
        tokens = tokens + batch.batch["response_mask"].sum((1, 2))
    return tokens.tolist()
