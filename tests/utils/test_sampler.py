"""Which rows go into which batch."""

from collections import Counter

import pytest

from verl.utils.dataset.sampler import EpochBatches


def batches(*args, **kwargs):
    return list(EpochBatches(*args, **kwargs))


def stream(*args, **kwargs):
    return [row for batch in batches(*args, **kwargs) for row in batch]


def test_without_shuffling_batches_cross_epochs():
    # 5 rows by twos: 0 1 | 2 3 | 4 0 | 1 2 | 3 4 | 0 1
    expected = [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]
    sampler = EpochBatches(rows=5, batch_size=2, batches=6, seed=None)
    assert list(sampler) == expected
    assert len(sampler) == 6
    assert list(sampler) == expected, "a second pass starts over"


def test_batch_larger_than_the_dataset():
    assert batches(rows=3, batch_size=7, batches=2, seed=None) == [[0, 1, 2, 0, 1, 2, 0], [1, 2, 0, 1, 2, 0, 1]]


def test_batch_larger_than_the_dataset_shuffled():
    # 14 places of 3 rows: four whole epochs and two rows of the fifth.
    rows = stream(rows=3, batch_size=7, batches=2, seed=4)
    assert [sorted(rows[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert len(set(rows[12:])) == 2


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_shuffled_epochs_hold_every_row_once(seed):
    # 11 rows, batches of 4: 22 batches are 88 places, 8 epochs.
    rows = stream(rows=11, batch_size=4, batches=22, seed=seed)
    epochs = [rows[i : i + 11] for i in range(0, 88, 11)]
    assert len(epochs) == 8
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert Counter(rows) == dict.fromkeys(range(11), 8)


def test_epochs_and_seeds_have_orders_of_their_own():
    rows = stream(rows=50, batch_size=10, batches=10, seed=1)
    first, second = rows[:50], rows[50:]
    assert first != second
    assert first != list(range(50))
    assert first != stream(rows=50, batch_size=10, batches=5, seed=2)
    assert first == stream(rows=50, batch_size=10, batches=5, seed=1)


def test_neighbouring_seeds_do_not_share_orders():
    # seed + epoch as a seed would make epoch 1 of seed 1 equal to epoch 0 of seed 2.
    assert stream(rows=50, batch_size=50, batches=2, seed=1)[50:] != stream(rows=50, batch_size=50, batches=1, seed=2)


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("done", range(0, 12))
def test_resuming_gives_the_tail(seed, done):
    whole = batches(rows=5, batch_size=3, batches=12, seed=seed)
    assert batches(rows=5, batch_size=3, batches=12 - done, seed=seed, start=3 * done) == whole[done:]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_resuming_in_the_middle_of_a_batch_and_with_another_size(start):
    whole = stream(rows=5, batch_size=1, batches=40, seed=7)
    assert stream(rows=5, batch_size=4, batches=6, seed=7, start=start) == whole[start : start + 24]


def test_rows_are_plain_integers():
    assert {type(row) for row in stream(rows=4, batch_size=3, batches=2, seed=0)} == {int}


def test_no_batches():
    assert batches(rows=4, batch_size=3, batches=0, seed=0) == []


def test_no_rows():
    with pytest.raises(ValueError, match="no rows"):
        EpochBatches(rows=0, batch_size=2, batches=1, seed=None)
