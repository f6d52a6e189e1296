"""Signals to this process, as a run takes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from verl.utils.signals import ENDING, EndedBySignal, RunSignals, out_of_reach


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """This process's own, unharmed whatever a test does."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    changed = [number for number, handler in before.items() if signal.getsignal(number) != handler]
    for number in changed:
        signal.signal(number, before[number])
    assert changed == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_outside_of_steps_a_signal_ends_at_once(number, code):
    signals = RunSignals()
    with pytest.raises(EndedBySignal) as end, signals.taken():
        send(number)
        pytest.fail("went on")
    assert end.value.exit_code == code


def test_one_that_a_library_has_made_nothing_of_is_obeyed_afterwards():
    signals, done = RunSignals(), []
    with pytest.raises(EndedBySignal, match="ended by SIGTERM"), signals.taken():
        signals.obey()
        try:
            send(signal.SIGTERM)
        except BaseException:
            done.append("passed over")
        signals.obey()
        done.append("went on")
    assert done == ["passed over"]


def test_a_first_one_waits_for_the_step_and_a_second_does_not(capfd):
    signals, done = RunSignals(), []
    with pytest.raises(EndedBySignal, match="ended by SIGTERM"), signals.taken(), signals.at_step_ends(True):
        send(signal.SIGTERM)
        done.append("step")
        send(signal.SIGINT)
        done.append("went on")
    assert done == ["step"]
    assert "SIGTERM: the run ends after this step" in capfd.readouterr().err


def test_an_order_that_arrives_twice_is_one(monkeypatch):
    """`timeout` signals a process, and then the group that it is in."""
    done = []
    with pytest.raises(EndedBySignal), (signals := RunSignals()).taken(), signals.at_step_ends(True):
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        done.append("step")
        monkeypatch.setattr("verl.utils.signals.ONE_ORDER_S", 0.0)
        send(signal.SIGTERM)
        done.append("went on")
    assert done == ["step"]


def test_a_run_that_comes_to_its_end_after_a_signal_still_says_so():
    signals = RunSignals()
    with pytest.raises(EndedBySignal), signals.taken(), signals.at_step_ends(True):
        send(signal.SIGHUP)
        assert signals.received == signal.SIGHUP


def test_without_waiting_the_first_one_ends_the_step():
    signals = RunSignals()
    with pytest.raises(EndedBySignal), signals.taken(), signals.at_step_ends(False):
        send(signal.SIGTERM)
        pytest.fail("went on")


def test_an_error_after_a_signal_is_shown_as_what_it_is():
    with pytest.raises(OSError, match="full"), (signals := RunSignals()).taken(), signals.at_step_ends(True):
        send(signal.SIGTERM)
        raise OSError("full")


def test_ignored_signals_stay_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunSignals().taken():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_takes_none():
    errors = []

    def work():
        try:
            with RunSignals().taken(), out_of_reach():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_what_is_started_out_of_reach_outlives_a_signal_and_the_starter_gets_it_afterwards():
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with out_of_reach():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray sets one of its own
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            # To this thread, whose mask it is: others, as test runners have, would take what is sent to the process.
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert got == []
        assert got == [signal.SIGTERM]
        child.send_signal(signal.SIGTERM)
        child.communicate(b"\n", timeout=60)
        assert child.returncode == 0
    finally:
        signal.signal(signal.SIGTERM, before)


STUBBORN = """
import os, signal
from verl.utils import signals
signals.ONE_ORDER_S = 0.0
with signals.RunSignals().taken():
    while True:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            print("not yet", flush=True)
"""


def test_an_end_that_does_not_come_is_the_systems_at_the_next_signal():
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "not yet\n")
