import signal
import threading
import time

import pytest

from verl.utils.time_limit import at_most


@pytest.fixture
def alarms():
    """The times at which a timer of somebody else's rang; pytest's own waits."""
    rang = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(time.monotonic()))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    yield rang
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_what_takes_too_long_ends(alarms):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the loop had not ended after 0\.1 s$"), at_most(0.1, "the loop"):
        while time.monotonic() < start + 60:
            pass
    assert time.monotonic() < start + 30


def test_another_timer_goes_on(alarms):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start = time.monotonic()
    with at_most(60, "x"):
        pass
    while not alarms and time.monotonic() < start + 30:
        time.sleep(0.01)
    assert alarms and alarms[0] >= start + 0.25


def test_one_that_ran_out_meanwhile_rings_afterwards(alarms):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with at_most(60, "x"):
        time.sleep(0.2)
        assert not alarms
    time.sleep(0.05)
    assert alarms


def test_in_another_thread_there_is_no_limit(alarms):
    ended = []

    def work():
        with at_most(0.01, "x"):
            time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
