"""The phases of a start, by a clock that the tests turn."""

import pytest

from verl.utils import startup
from verl.utils.run_log import phase
from verl.utils.startup import Phase, _Record, begin, conclude, note, noted, noted_beside


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Turns the clock on by so many seconds."""
    monkeypatch.setattr(startup, "_record", _Record())
    now = [1000.0]
    monkeypatch.setattr(startup.time, "time", lambda: now[0])
    monkeypatch.setattr(startup.time, "monotonic", lambda: now[0])

    def turn(seconds):
        now[0] += seconds

    return turn


def test_phases_parts_and_what_is_left(clock):
    begin(at=997.0)
    note("loading libraries", 3.0)
    with noted("building models"):
        clock(1)
        with noted("reading"):
            clock(4)
        with noted("proving"):
            clock(2)
    clock(5)
    assert conclude() == (
        3 + 7 + 5,
        [
            Phase("loading libraries", 3.0, 0),
            Phase("building models", 7.0, 0),
            Phase("reading", 4.0, 1),
            Phase("proving", 2.0, 1),
        ],
    )


def test_it_is_told_once_and_nothing_is_kept_afterwards(clock):
    begin()
    conclude()
    with noted("later"):
        clock(1)
    note("later still", 1.0)
    assert conclude() is None and startup.phases() == []


def test_only_the_first_push_is_part_of_a_start(clock):
    begin()
    for seconds in (2, 9):
        with noted("pushing"):
            clock(seconds)
    assert conclude() == (11, [Phase("pushing", 2.0, 0)])


def test_a_second_run_of_a_process_begins_anew(clock):
    begin()
    with noted("reading"):
        clock(2)
    begin()  # What has begun goes on.
    assert conclude() == (2, [Phase("reading", 2.0, 0)])
    clock(50)
    begin()
    clock(1)
    assert conclude() == (1, [])


def test_what_the_log_calls_a_phase_is_one_even_if_it_fails(clock):
    begin()
    with pytest.raises(ZeroDivisionError), phase("reading data"):
        clock(3)
        raise ZeroDivisionError
    with phase("starting Ray"):
        clock(2)
    assert conclude() == (5, [Phase("reading data", 3.0, 0), Phase("starting Ray", 2.0, 0)])


def test_what_goes_on_beside_the_phases_is_no_part_of_their_sum_or_order(clock):
    begin()
    with noted("building"):
        clock(1)
        with noted_beside("reading"):
            clock(2)
        with noted("proving"):
            clock(4)
    assert conclude() == (
        7, [Phase("building", 7.0, 0), Phase("proving", 4.0, 1), Phase("reading", 2.0, 0, beside=True)]
    )  # fmt: skip


def test_what_ends_after_the_start_is_not_kept(clock):
    begin()
    with noted_beside("reading"):
        clock(1)
        conclude()
    assert startup.phases() == []
