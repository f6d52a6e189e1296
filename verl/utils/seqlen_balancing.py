"""Sharing out rows of unequal length: over ranks (balanced partitions) and over micro-batches (a token budget).

Everything works on lists of lengths and gives back lists of row indices; tensors are the callers' business.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def ceildiv(a: int, b: int) -> int:
    """a / b rounded up, in integers."""
    return -(-a // b)


# ---------------------------------------------------------------------------------------------------------------------
# Partitions


def _check_partition_request(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> None:
    count = len(seqlen_list)
    if not 1 <= k_partitions <= count:
        raise ValueError(f"{count} rows cannot fill {k_partitions} partitions")
    if equal_size and count % k_partitions:
        raise ValueError(f"{count} rows do not divide into {k_partitions} partitions of equal size")


def karmarkar_karp(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Row indices in k partitions of nearly equal total length, by the largest differencing method.

    Karmarkar and Karp 1982, for k subsets: a heap holds partial solutions of k subsets each; the two with the largest
    spread (largest minus smallest sum) are merged, the largest subset of one with the smallest of the other, until one
    is left. With `equal_size` the partial solutions start with one row in every subset, which merging preserves.

    Raises:
        ValueError: fewer rows than partitions, or `equal_size` and the rows do not divide.
    """
    _check_partition_request(seqlen_list, k_partitions, equal_size)
    ascending = sorted(range(len(seqlen_list)), key=lambda row: seqlen_list[row])
    width = k_partitions if equal_size else 1

    # A subset is (sum, rows). Sorted by sum and then by number of rows, an empty subset is always the last to stay so.
    def spread_and_sort(subsets: list[tuple[int, list[int]]]) -> tuple[int, list[tuple[int, list[int]]]]:
        subsets = sorted(subsets, key=lambda subset: (subset[0], len(subset[1])), reverse=True)
        return subsets[0][0] - subsets[-1][0], subsets

    heap = []
    for serial, start in enumerate(range(0, len(ascending), width)):
        rows = ascending[start : start + width]
        filled = [(seqlen_list[row], [row]) for row in rows]
        spread, subsets = spread_and_sort(filled + [(0, [])] * (k_partitions - len(filled)))
        heap.append((-spread, serial, subsets))
    heapq.heapify(heap)

    for serial in range(len(heap), 2 * len(heap) - 1):
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, reversed(second), strict=True)]
        spread, subsets = spread_and_sort(merged)
        heapq.heappush(heap, (-spread, serial, subsets))
    return [rows for _, rows in heap[0][2]]


def greedy_partition(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Row indices in k partitions: longest row first, each to the partition with the smallest sum (Graham 1969, LPT).

    Raises:
        ValueError: fewer rows than partitions, or `equal_size` and the rows do not divide.
    """
    _check_partition_request(seqlen_list, k_partitions, equal_size)
    capacity = len(seqlen_list) // k_partitions if equal_size else len(seqlen_list)
    partitions: list[list[int]] = [[] for _ in range(k_partitions)]
    sums = [0] * k_partitions
    for row in sorted(range(len(seqlen_list)), key=lambda row: seqlen_list[row], reverse=True):
        open_ones = [k for k in range(k_partitions) if len(partitions[k]) < capacity]
        target = min(open_ones, key=lambda k: (sums[k], len(partitions[k])))
        partitions[target].append(row)
        sums[target] += seqlen_list[row]
    return partitions


def get_seqlen_balanced_partitions(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """k lists of row indices with nearly equal total length (Karmarkar-Karp), none empty, each in ascending order.

    Raises:
        ValueError: fewer rows than partitions, or `equal_size` and the rows do not divide.
    """
    return [sorted(rows) for rows in karmarkar_karp(seqlen_list, k_partitions, equal_size)]


def log_seqlen_unbalance(
    seqlen_list: Sequence[int], partitions: Sequence[Sequence[int]], prefix: str
) -> dict[str, float]:
    """Tokens per partition, before (rows in file order, cut into runs) and after balancing.

    Returns:
        {prefix}/min, max, minmax_diff of the k runs; {prefix}/balanced_min, balanced_max of the partitions; and
        {prefix}/mean, the same for both.
    """
    lengths = np.asarray(seqlen_list)
    before = [int(run.sum()) for run in np.array_split(lengths, len(partitions))]
    after = [int(lengths[list(rows)].sum()) for rows in partitions]
    return {
        f"{prefix}/min": min(before),
        f"{prefix}/max": max(before),
        f"{prefix}/minmax_diff": max(before) - min(before),
        f"{prefix}/balanced_min": min(after),
        f"{prefix}/balanced_max": max(after),
        f"{prefix}/mean": sum(before) / len(partitions),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows packed into bins of at most `budget` tokens, longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        target = next((i for i, free in enumerate(room) if free >= lengths[row]), None)
        if target is None:
            target = len(bins)
            bins.append([])
            room.append(budget)
        bins[target].append(row)
        room[target] -= lengths[row]
    return bins


def _split_to_count(bins: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Halve the fullest bin of several rows until there are `count` bins: parts of a bin fit wherever it did."""
    bins = list(bins)
    while len(bins) < count:
        fullest = max((rows for rows in bins if len(rows) > 1), key=lambda rows: sum(lengths[r] for r in rows))
        bins.remove(fullest)
        halves = greedy_partition([lengths[r] for r in fullest], 2, equal_size=False)
        bins.extend([fullest[i] for i in half] for half in halves)
    return bins


class _BudgetPacker:
    """The rows of one batch, packed under a token budget; rows that are longer than the budget stand alone."""

    def __init__(self, lengths: Sequence[int], budget: int):
        self.all_lengths = lengths
        self.alone = [[row] for row, length in enumerate(lengths) if length > budget]
        self.rows = [row for row, length in enumerate(lengths) if length <= budget]
        self.lengths = [lengths[row] for row in self.rows]
        self.budget = budget
        self.fallback = _first_fit_decreasing(self.lengths, budget)

    def _balanced(self, count: int) -> list[list[int]] | None:
        """`count` balanced bins, or None when one of them exceeds the budget."""
        bins = karmarkar_karp(self.lengths, count, equal_size=False)
        fits = all(sum(self.lengths[i] for i in rows) <= self.budget for rows in bins)
        return bins if fits else None

    def fewest(self) -> int:
        """The smallest number of micro-batches that balancing or, failing that, first-fit-decreasing reaches."""
        if not self.rows:
            return len(self.alone)
        lower_bound = max(1, ceildiv(sum(self.lengths), self.budget))
        counts = range(lower_bound, len(self.fallback))
        return len(self.alone) + next((k for k in counts if self._balanced(k)), len(self.fallback))

    def tokens(self, rows: Sequence[int]) -> int:
        """Total tokens of the given rows."""
        return sum(self.all_lengths[row] for row in rows)

    def pack(self, count: int) -> list[list[int]]:
        """Exactly `count` micro-batches, from fewest() to the number of rows."""
        if not self.rows:
            return self.alone
        shared = count - len(self.alone)
        bins = self._balanced(shared) or _split_to_count(self.fallback, self.lengths, shared)
        return self.alone + [[self.rows[i] for i in rows] for rows in bins]


class _RunPacker:
    """Runs of one batch's rows, in their order, under a token budget. A row has `shared` tokens less if the previous
    row is in the same run. A row that is longer than the budget stands alone."""

    def __init__(self, lengths: Sequence[int], shared: Sequence[int], budget: int):
        self.lengths, self.shared, self.budget = lengths, shared, budget

    def _runs(self, budget: int) -> list[list[int]]:
        """The fewest runs: each is as long as the budget allows, from the first row on."""
        runs: list[list[int]] = []
        tokens = 0
        for row, (length, shared) in enumerate(zip(self.lengths, self.shared, strict=True)):
            if runs and tokens + length - shared <= budget:
                runs[-1].append(row)
                tokens += length - shared
            else:
                runs.append([row])
                tokens = length
        return runs

    def fewest(self) -> int:
        """The smallest number of micro-batches."""
        return len(self._runs(self.budget))

    def pack(self, count: int) -> list[list[int]]:
        """Exactly `count` micro-batches, from fewest() to the number of rows, the largest as small as can be."""
        smallest = bisect_left(range(self.budget), True, key=lambda budget: len(self._runs(budget)) <= count)
        runs = self._runs(smallest)
        while len(runs) < count:
            place = max((i for i, run in enumerate(runs) if len(run) > 1), key=lambda i: self.tokens(runs[i]))
            run, half = runs[place], len(runs[place]) // 2
            runs[place : place + 1] = [run[:half], run[half:]]
        return runs

    def tokens(self, run: Sequence[int]) -> int:
        """Total tokens of consecutive rows, shared prompts counted once."""
        return sum(self.lengths[row] for row in run) - sum(self.shared[row] for row in run[1:])


def _agree_on_count(count: int, rows: int, group: Any) -> tuple[int, int]:
    """(largest count, smallest number of rows) over the ranks of the group, in one all-reduce."""
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else torch.device("cuda", torch.cuda.current_device())
    agreed = torch.tensor([count, -rows], dtype=torch.long, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    largest, minus_fewest_rows = agreed.tolist()
    return largest, -minus_fewest_rows


def rearrange_micro_batches(
    lengths: Sequence[int],
    max_token_len: int,
    dp_group: Any = None,
    min_num_micro_batch: int = 1,
    shared: Sequence[int] | None = None,
) -> list[list[int]]:
    """Share rows out over as few, and as equal, micro-batches as the token budget allows.

    Every row is in exactly one micro-batch; no micro-batch of more than one row has more than `max_token_len` tokens,
    and a row longer than that is alone. (The fewest possible is bin packing, NP-hard: this is the better of
    balancing and first-fit-decreasing, which needs at most 11/9 of the optimum plus one. Where rows have
    `shared` tokens they stay in their order, and the fewest possible is reached.)

    Args:
        lengths: tokens of each row.
        max_token_len: the budget in tokens.
        dp_group: with torch.distributed running, every rank of this group gets the same number of micro-batches, so
            that their collectives match; all its ranks must call this together.
        min_num_micro_batch: never fewer micro-batches than this.
        shared: tokens per row that are saved if the previous row is in the same micro-batch.

    Returns:
        Row indices per micro-batch, the one with most tokens first, so that a lack of memory shows at once.

    Raises:
        ValueError: `max_token_len` is not positive.
        AssertionError: a rank has fewer rows than micro-batches are needed; raised on every rank alike.
    """
    if max_token_len < 1:
        raise ValueError(f"max_token_len={max_token_len} must be at least 1")
    in_order = shared is not None and any(shared)
    packer = _RunPacker(lengths, shared, max_token_len) if in_order else _BudgetPacker(lengths, max_token_len)
    count, fewest_rows = max(1, min_num_micro_batch, packer.fewest()), len(lengths)
    if dp_group is not None and dist.is_initialized():
        count, fewest_rows = _agree_on_count(count, fewest_rows, dp_group)
    assert count <= fewest_rows, (
        f"{count} micro-batches are needed (max_token_len={max_token_len}, min_num_micro_batch={min_num_micro_batch}, "
        f"the largest need of all ranks), but a rank has only {fewest_rows} rows: balance the batch over the ranks, "
        "raise the token budget, or lower min_num_micro_batch"
    )
    micro_batches = [sorted(rows) for rows in packer.pack(count)]
    return sorted(micro_batches, key=lambda rows: (-packer.tokens(rows), rows))


# ---------------------------------------------------------------------------------------------------------------------
# Names of verl's that nothing here calls


def roundup_divisible(a: int, b: int) -> int:
    """The smallest multiple of b that is not below a."""
    return ceildiv(a, b) * b


def calculate_workload(seqlens: torch.Tensor, hidden_size: int = 4096) -> torch.Tensor:
    """Relative cost of a forward pass over sequences of these lengths, (N,) -> (N,).

    A layer costs about 24 h^2 s + 4 h s^2 operations (Korthikanti et al. 2022, appendix A, with batch size 1): divided
    by 4 h, that is 6 h s + s^2.
    """
    return 6 * hidden_size * seqlens + seqlens**2


def get_reverse_idx(idx_map: Sequence[int]) -> list[int]:
    """The inverse of a permutation: result[idx_map[i]] == i."""
    reverse = [0] * len(idx_map)
    for position, index in enumerate(idx_map):
        reverse[index] = position
    return reverse


def prepare_dynamic_batch(
    data: Any, max_token_len: int, dp_group: Any = None, min_num_micro_batch: int = 1
) -> tuple[list[Any], list[list[int]]]:
    """A DataProto cut by rearrange_micro_batches on the lengths in its attention_mask (B, T).

    Returns:
        The micro-batches, and the row indices of each, for restore_dynamic_batch.
    """
    lengths = data.batch["attention_mask"].sum(dim=-1).tolist()
    indices = rearrange_micro_batches(lengths, max_token_len, dp_group, min_num_micro_batch)
    return [data.select_idxs(rows) for rows in indices], indices


def restore_dynamic_batch(values: torch.Tensor, indices: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows (B, ...) concatenated in micro-batch order, put back into the order of the batch."""
    return values[get_reverse_idx(list(chain.from_iterable(indices)))]
