"""What keeps this process waiting: named, and ended with stacks."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.small_disk import small_disk
from verl.utils import stalls
from verl.utils.stacks import own_stacks, processes_with, report
from verl.utils.stalls import StallError, StallWatch, doing, duration, waiting

SRC = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def as_before():
    """Nothing is left of a watch: no handler, no clock, no sentence."""
    numbers = (signal.SIGURG, signal.SIGVTALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert stalls._sentences == []


def sleeps_for_long():
    time.sleep(60)


def test_what_takes_long_is_named_sparingly_and_what_takes_too_long_ends(caplog):
    """After .2 s, .4 and .8; the end after 1.5. Outer blocks do not count."""
    caplog.set_level(logging.WARNING)
    start = time.monotonic()
    with (
        pytest.raises(StallError) as end,
        StallWatch(0.2, 1.5).at_work(),
        doing("everything"),
        waiting("rank 1 is out"),
    ):
        sleeps_for_long()
    assert 1.5 <= time.monotonic() - start < 10
    assert str(end.value).startswith("rank 1 is out for 2 s, which is more than trainer.stall_timeout=1.5 s allows")
    assert end.value.__cause__ is None and end.value.__suppress_context__
    *warnings, stacks = [record.message for record in caplog.records]
    assert warnings == ["rank 1 is out for 0 s", "rank 1 is out for 0 s", "rank 1 is out for 1 s"]
    assert "in sleeps_for_long" in stacks and f"the driver, process {os.getpid()}" in stacks


def test_time_is_counted_from_the_latest_beginning_or_end(caplog):
    with StallWatch(-1, 0.5).at_work(), doing("the whole"):
        for _ in range(10):
            with doing("a part"):
                time.sleep(0.1)
        time.sleep(0.2)
    assert caplog.records == []


def test_what_another_thread_does_keeps_nobody_waiting():
    """Its blocks neither name what is waited for nor let time begin anew."""

    def looks_now_and_then():
        for _ in range(100):
            with doing("a look from beside"):
                time.sleep(0.02)

    start = time.monotonic()
    with pytest.raises(StallError, match="the work has not ended"), StallWatch(-1, 0.5).at_work(), doing("the work"):
        threading.Thread(target=looks_now_and_then, daemon=True).start()
        sleeps_for_long()
    assert time.monotonic() - start < 1.9


def test_nothing_is_watched_between_things_and_with_both_off(caplog):
    with StallWatch(0.1, 0.2).at_work():
        time.sleep(0.5)
    with StallWatch(-1, -1).at_work(), doing("this"):
        time.sleep(0.3)
    assert caplog.records == []


def test_a_process_that_was_stopped_itself_goes_on():
    """The whole time of the stop is longer than the timeout."""
    code = (
        "import os, signal, time\nfrom verl.utils.stalls import StallWatch, doing\n"
        "with StallWatch(-1, 1).at_work(), doing('this'):\n"
        "    time.sleep(.3); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(.1)\n"
        "print('went on')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=SRC)
    os.waitpid(child.pid, os.WUNTRACED)
    time.sleep(2)
    child.send_signal(signal.SIGCONT)
    assert child.communicate(timeout=30)[0] == "went on\n"


def test_a_regular_expression_that_runs_wild(caplog):
    """It holds the interpreter's lock: no other thread has a turn by itself."""
    with pytest.raises(StallError, match="the reward has not ended"), StallWatch(0.2, 1).at_work(), doing("the reward"):
        re.match(r"(a+)+$", "a" * 60 + "b")
    assert caplog.records[0].message == "the reward has not ended for 0 s"


@pytest.mark.parametrize("whose", ["", ", cannot_end_the_run('it')"])
def test_code_that_swallows_every_exception_ends_with_the_process_and_its_children(whose):
    """A user's, too, in whose place os._exit is another."""
    code = (
        "import logging, subprocess, time\nfrom verl.utils import stalls\nstalls.GIVE_UP_S = 1\n"
        "from verl.utils.user_code import cannot_end_the_run\n"
        "child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True)\n"
        f"with stalls.StallWatch(-1, .5).at_work(), stalls.doing('that'){whose}:\n"
        "    while True:\n        try:\n            time.sleep(100)\n        except BaseException:\n            pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=SRC)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("that has not ended for ") and last.endswith("the process ends without it")
    assert not psutil.pid_exists(int(done.stdout)) or psutil.Process(int(done.stdout)).status() == "zombie"


@pytest.mark.parametrize("witness", ["does not answer", "fails"])
def test_ranks_that_cannot_be_asked_keep_no_run_from_its_end(monkeypatch, caplog, witness):
    class Witness:
        def reports(self):
            if witness == "fails":
                raise psutil.NoSuchProcess(1)
            time.sleep(60)

    there = Witness()
    monkeypatch.setattr(stalls, "witnesses", [there])
    monkeypatch.setattr(stalls, "REPORTS_S", 0.2)
    start = time.monotonic()
    with pytest.raises(StallError, match="it has not ended"), StallWatch(-1, 0.3).at_work(), doing("it"):
        sleeps_for_long()
    assert time.monotonic() - start < 10
    assert "a group of ranks could not be asked" in caplog.text and "in sleeps_for_long" in caplog.text


def test_a_full_disk_keeps_nobody_from_the_stacks(monkeypatch, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(OSError, match="No space left"):
            (disk / "fill").write_bytes(b"x" * (2 << 20))
        assert "in test_a_full_disk_keeps_nobody_from_the_stacks" in own_stacks()


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_user_code_does_not_take_the_end_for_its_own(caught):
    from verl.utils.user_code import cannot_end_the_run

    def careless():
        try:
            time.sleep(60)
        except caught:
            return 0

    went_on, cleaned_up = [], []
    with pytest.raises(StallError), StallWatch(-1, 0.3).at_work():
        try:
            with cannot_end_the_run("it"), doing("it"):
                careless()
            went_on.append(True)
        finally:
            for _ in range(2):
                with doing("to clean up"):
                    cleaned_up.append(True)
    assert not went_on and len(cleaned_up) == 2


def test_ctrl_c_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt), StallWatch(-1, 60).at_work(), doing("it"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_outside_the_main_thread_a_stall_is_named_and_nothing_ends(caplog):
    def run():
        with StallWatch(-1, 0.2).at_work(), doing("it"):
            time.sleep(1)
            finished.append(True)

    finished = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert finished and "it has not ended for 0 s. Where everything is" in caplog.text


def test_stacks_of_another_process_in_c_code_and_stopped():
    code = (
        "import ctypes\nfrom verl.utils.stacks import answer_when_asked\n"
        "def waits_in_c():\n    print('there', flush=True)\n    ctypes.PyDLL(None).sleep(1000)\n"
        "answer_when_asked()\nwhile True: waits_in_c()\n"
    )
    mark = {"STACKS_OF_THE_TESTS": str(time.time())}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=SRC, env=os.environ | mark, text=True
    )
    try:
        assert child.stdout.readline() == "there\n"
        time.sleep(0.2)
        (process,) = processes_with(*next(iter(mark.items())))
        assert process.pid == child.pid
        for _ in range(2):
            text = report(process)
            assert text.startswith(f"process {child.pid}, sleeping, 1 threads") and "in waits_in_c" in text
            assert text.count("most recent call first") == 1
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        text = report(process)
        assert f"process {child.pid}, stopped" in text and "It gave no stacks" in text
    finally:
        child.kill()
        child.wait()
    assert report(process) == f"process {child.pid} is gone"


def test_processes_that_end_while_they_are_looked_for_are_left_out(monkeypatch):
    class Process(psutil.Process):
        """One that is gone after `looks` looks at it."""

        def __init__(self, looks):
            super().__init__()
            self.looks = looks

        def look(self, what):
            self.looks -= 1
            if self.looks < 0:
                raise psutil.NoSuchProcess(self.pid)
            return what

        def environ(self):
            return self.look({"MARK": "x", "RANK": "3"})

        def create_time(self):
            return self.look(1.0)

    listed = [Process(0), Process(1), Process(3)]
    monkeypatch.setattr(psutil, "process_iter", lambda: listed)
    assert processes_with("MARK", "x") == listed[2:]


@pytest.mark.parametrize(
    ("seconds", "said"), [(45, "45 s"), (60, "1 min"), (90, "90 s"), (600, "10 min"), (7200, "2 h"), (9000, "2.5 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
