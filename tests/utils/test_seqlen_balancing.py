import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ranks import leave
from verl.utils import seqlen_balancing as sb


def sums(lengths, partitions):
    return [sum(lengths[row] for row in rows) for rows in partitions]


def rows_of(partitions):
    return sorted(row for rows in partitions for row in rows)


# ---- small helpers


def test_ceildiv_and_roundup():
    assert [sb.ceildiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [sb.roundup_divisible(a, 4) for a in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_calculate_workload():
    # h = 2: 12 s + s^2
    assert sb.calculate_workload(torch.tensor([0, 1, 10]), hidden_size=2).tolist() == [0, 13, 220]


def test_reverse_idx():
    assert sb.get_reverse_idx([2, 0, 3, 1]) == [1, 3, 0, 2]


# ---- partitions


def test_karmarkar_karp_on_the_textbook_case():
    # 8 7 6 5 4 in two: differencing 8-7=1, 6-5=1, 4-1=3, 3-1=2, so the sums are 16 and 14 (the optimum is 15 and 15).
    lengths = [4, 5, 6, 7, 8]
    partitions = sb.karmarkar_karp(lengths, 2, equal_size=False)
    assert sorted(sums(lengths, partitions)) == [14, 16]
    assert rows_of(partitions) == [0, 1, 2, 3, 4]


def test_greedy_on_the_textbook_case():
    # 8 | 7, 6 to the 7, 5 to the 8, 4 to either 13: 17 and 13
    lengths = [4, 5, 6, 7, 8]
    assert sorted(sums(lengths, sb.greedy_partition(lengths, 2, equal_size=False))) == [13, 17]


@pytest.mark.parametrize("partition", [sb.karmarkar_karp, sb.greedy_partition])
def test_equal_size_keeps_the_row_count_equal(partition):
    lengths = [100, 1, 1, 1, 1, 1]
    partitions = partition(lengths, 2, equal_size=True)
    assert [len(rows) for rows in partitions] == [3, 3]
    assert sorted(sums(lengths, partitions)) == [3, 102]
    assert rows_of(partitions) == list(range(6))


@pytest.mark.parametrize("equal_size", [True, False])
@pytest.mark.parametrize("partition", [sb.karmarkar_karp, sb.greedy_partition, sb.get_seqlen_balanced_partitions])
def test_partitions_of_random_lengths(partition, equal_size):
    rng = random.Random(0)
    for k in (1, 2, 4, 8):
        lengths = [rng.randint(1, 2000) for _ in range(64)]
        partitions = partition(lengths, k, equal_size)
        assert rows_of(partitions) == list(range(64))
        loads = sums(lengths, partitions)
        assert max(loads) - min(loads) <= max(lengths)
        if equal_size:
            assert {len(rows) for rows in partitions} == {64 // k}


def test_no_partition_is_empty_even_for_empty_rows():
    for lengths, k in [([0, 0, 0], 3), ([5, 0], 2), ([9, 8, 7, 0, 0], 5), ([100, 1, 1], 3)]:
        assert all(sb.get_seqlen_balanced_partitions(lengths, k, equal_size=False))
        assert all(sb.greedy_partition(lengths, k, equal_size=False))


def test_balanced_partitions_beat_file_order():
    lengths = [10, 9, 8, 7, 1, 2, 3, 4]
    partitions = sb.get_seqlen_balanced_partitions(lengths, 2, equal_size=True)
    assert sums(lengths, partitions) == [22, 22]
    assert all(rows == sorted(rows) for rows in partitions)
    assert sb.log_seqlen_unbalance(lengths, partitions, "global_seqlen") == {
        "global_seqlen/min": 10,
        "global_seqlen/max": 34,
        "global_seqlen/minmax_diff": 24,
        "global_seqlen/balanced_min": 22,
        "global_seqlen/balanced_max": 22,
        "global_seqlen/mean": 22.0,
    }


def test_partition_errors():
    with pytest.raises(ValueError, match="2 rows cannot fill 3 partitions"):
        sb.karmarkar_karp([1, 2], 3, equal_size=False)
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        sb.get_seqlen_balanced_partitions([1] * 5, 2, equal_size=True)


# ---- micro-batches


def check_micro_batches(lengths, budget, micro_batches):
    assert rows_of(micro_batches) == list(range(len(lengths)))
    for rows, load in zip(micro_batches, sums(lengths, micro_batches), strict=True):
        assert rows
        assert len(rows) == 1 or load <= budget


def test_everything_fits_in_one():
    assert sb.rearrange_micro_batches([3, 4, 5], max_token_len=12) == [[0, 1, 2]]


def test_two_balanced_micro_batches():
    # 24 tokens, at most 15 each: {6, 5, 1} and {4, 8}
    lengths = [6, 5, 4, 8, 1]
    micro_batches = sb.rearrange_micro_batches(lengths, max_token_len=15)
    check_micro_batches(lengths, 15, micro_batches)
    assert sums(lengths, micro_batches) == [12, 12]


def test_the_count_rises_when_the_budget_cannot_be_met():
    # 30 tokens and a budget of 15 would need two, but any two of these are over 15.
    assert sb.rearrange_micro_batches([10, 10, 10], max_token_len=15) == [[0], [1], [2]]


def test_first_fit_decreasing_saves_a_micro_batch_where_balancing_misses():
    # Karmarkar-Karp splits 8 7 6 5 4 into 16 and 14, which a budget of 15 refuses; first-fit-decreasing gives 8+7 and
    # 6+5+4, the two micro-batches that the total of 30 asks for.
    lengths = [4, 5, 6, 7, 8]
    assert sb.rearrange_micro_batches(lengths, max_token_len=15) == [[0, 1, 2], [3, 4]]


def test_a_row_over_the_budget_is_alone():
    lengths = [3, 50, 3, 12, 4]
    assert sb.rearrange_micro_batches(lengths, max_token_len=11) == [[1], [3], [0, 2, 4]]
    assert sb.rearrange_micro_batches([50, 60], max_token_len=10) == [[1], [0]]


def test_min_num_micro_batch():
    lengths = [4, 4, 4, 4]
    assert len(sb.rearrange_micro_batches(lengths, 100, min_num_micro_batch=3)) == 3
    assert len(sb.rearrange_micro_batches([50, 4, 4], 10, min_num_micro_batch=3)) == 3
    with pytest.raises(AssertionError, match=r"5 micro-batches are needed.*only 4 rows"):
        sb.rearrange_micro_batches(lengths, 100, min_num_micro_batch=5)


def test_bad_budget_and_no_rows():
    with pytest.raises(ValueError, match="max_token_len=0"):
        sb.rearrange_micro_batches([1], 0)
    with pytest.raises(AssertionError, match="only 0 rows"):
        sb.rearrange_micro_batches([], 10)


def test_random_batches_keep_the_budget_for_every_count():
    rng = random.Random(1)
    for _ in range(300):
        lengths = [rng.randint(0, 30) for _ in range(rng.randint(1, 14))]
        budget = rng.randint(5, 40)
        fewest = len(sb.rearrange_micro_batches(lengths, budget))
        assert fewest >= sum(lengths) / max(budget, max(lengths))
        for count in range(fewest, len(lengths) + 1):
            micro_batches = sb.rearrange_micro_batches(lengths, budget, min_num_micro_batch=count)
            assert len(micro_batches) == count
            check_micro_batches(lengths, budget, micro_batches)


def test_restore_puts_rows_back():
    indices = [[3, 0], [2], [1, 4]]
    in_micro_batch_order = torch.tensor([[30], [0], [20], [10], [40]])
    assert sb.restore_dynamic_batch(in_micro_batch_order, indices).tolist() == [[0], [10], [20], [30], [40]]


def test_prepare_and_restore_a_dataproto():
    protocol = pytest.importorskip("verl.protocol")
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    data = protocol.DataProto.from_dict(tensors={"attention_mask": mask, "row": torch.arange(4)})
    micro_batches, indices = sb.prepare_dynamic_batch(data, max_token_len=5)
    assert indices == [[0, 1], [2, 3]]
    rows = torch.cat([micro_batch.batch["row"] for micro_batch in micro_batches])
    assert sb.restore_dynamic_batch(rows, indices).tolist() == [0, 1, 2, 3]


# ---- rows that share tokens with the row before them

# Three rows of one prompt of 4 tokens, two of another, one of a third.
LENGTHS, SHARED = [6, 7, 5, 9, 6, 10], [0, 4, 4, 0, 4, 0]


@pytest.mark.parametrize(
    ("budget", "at_least", "expected"),
    [
        (31, 1, [[0, 1, 2, 3, 4, 5]]),  # 6 + 3 + 1 + 9 + 2 + 10
        (30, 1, [[0, 1, 2, 3], [4, 5]]),  # 19 and 16; 21 and 10, or 10 and 21, would be less even
        (11, 1, [[3, 4], [0, 1, 2], [5]]),  # 11, 10, 10
        (31, 3, [[3, 4], [0, 1, 2], [5]]),
        (10, 1, [[0, 1, 2], [5], [3], [4]]),  # 10, 10, 9, 6: the second prompt once more
        (8, 1, [[5], [3], [1, 2], [0], [4]]),  # 10 and 9 are alone, as they are more than 8; 8, 6, 6
    ],
)
def test_shared_tokens_count_once(budget, at_least, expected):
    assert sb.rearrange_micro_batches(LENGTHS, budget, min_num_micro_batch=at_least, shared=SHARED) == expected


def test_a_count_between_two_that_a_budget_gives():
    # Four rows of 3 tokens, 2 of them shared: within 4 tokens two and two, within 3 each alone.
    assert sb.rearrange_micro_batches([3] * 4, 9, min_num_micro_batch=3, shared=[0, 2, 2, 2]) == [[2, 3], [0], [1]]


# ---- several ranks


def _ask_from_rank(rank, lengths_by_rank, folder, shared_by_rank=(None, None)):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(lengths_by_rank))
    try:
        answer = sb.rearrange_micro_batches(
            lengths_by_rank[rank], 10, dp_group=dist.group.WORLD, shared=shared_by_rank[rank]
        )
    except AssertionError as error:
        answer = str(error)
    torch.save(answer, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.distributed
def test_ranks_agree_on_the_count(tmp_path):
    lengths_by_rank = ([9, 8, 7], [1, 2, 3, 4])
    mp.spawn(_ask_from_rank, args=(lengths_by_rank, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == [[0], [1], [2]]
    assert sums([1, 2, 3, 4], second) == [4, 3, 3]
    check_micro_batches([1, 2, 3, 4], 10, second)


@pytest.mark.distributed
def test_every_rank_hears_of_too_few_rows(tmp_path):
    mp.spawn(_ask_from_rank, args=(([9, 8, 7], [1, 2]), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert "3 micro-batches are needed" in torch.load(tmp_path / f"{rank}.pt")


@pytest.mark.distributed
def test_a_rank_that_shares_much_has_as_many_micro_batches(tmp_path):
    """Four rows of 4 + 1 tokens, once of one prompt and once of four, of which a budget of 10 holds two."""
    lengths_by_rank, shared_by_rank = ([5] * 4, [5] * 4), ([0, 4, 4, 4], [0] * 4)
    mp.spawn(_ask_from_rank, args=(lengths_by_rank, str(tmp_path), shared_by_rank), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == [[0, 1], [2, 3]]
    assert [len(rows) for rows in second] == [2, 2]
