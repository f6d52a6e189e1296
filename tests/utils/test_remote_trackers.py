"""Trackers that may wait for somebody else: they neither slow nor end a run, whatever they do."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from verl.utils.tracking import BACKENDS, Backend, Tracking, tracker
from verl.utils.tracking.queued import Queued


class Remote(Backend):
    """Keeps what it is given, when it is let; raises what it is told to."""

    remote = True

    def __init__(self, run=None):
        self.gate = threading.Event()
        self.gate.set()
        self.error = None
        self.taken, self.threads = [], {threading.get_ident()}

    def _take(self, *what):
        self.threads.add(threading.get_ident())
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        self.taken.append(what)

    def log(self, data, step):
        self._take(step, dict(data))

    def log_samples(self, samples, step):
        self._take(step, samples)

    def alert(self, title, text, step):
        self._take(step, title)

    def close(self):
        self._take("closed")


@pytest.fixture
def remote(monkeypatch):
    """The backend that `trainer.logger=remote` opens."""
    there = []

    class Kept(Remote):
        def __init__(self, run):
            super().__init__(run)
            there.append(self)

    monkeypatch.setitem(BACKENDS, "remote", Kept)
    return there


def opened(there, tracking):
    assert tracking.flush(10)
    return there[0]


def steps(backend):
    return [what[0] for what in backend.taken]


def test_everything_arrives_in_order_from_one_thread(remote, tmp_path):
    with Tracking("p", "e", ["remote", "file"], log_dir=tmp_path) as tracking:
        for step in range(200):
            tracking.log({"x": step}, step)
        tracking.log_samples([("a",)], 200)
        tracking.alert("title", "text", 201)
    (backend,) = remote
    assert steps(backend) == [*range(202), "closed"]
    assert backend.taken[7] == (7, {"x": 7}) and backend.taken[201] == (201, "title")
    assert len(backend.threads) == 1 and threading.get_ident() not in backend.threads
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200


def test_a_tracker_that_hangs_is_not_waited_for(remote, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracker, "FLUSH_S", 0.5)
    tracking = Tracking("p", "e", ["remote", "file"], log_dir=tmp_path)
    backend = opened(remote, tracking)
    backend.gate.clear()
    start = time.perf_counter()
    for step in range(100):
        tracking.log({f"metric/{number}": 1.0 for number in range(100)}, step)
    # A file's line is written in it, too.
    assert (time.perf_counter() - start) / 100 < 0.02
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    assert not tracking.flush(0.1)
    start = time.perf_counter()
    tracking.finish()
    assert time.perf_counter() - start < 5
    assert "trainer.logger remote has not ended in time: the run ends without its last 100 entries" in caplog.text
    # What comes late is nothing to anybody.
    caplog.clear()
    tracking.finish()
    backend.gate.set()
    time.sleep(0.2)
    assert caplog.text == "" and "closed" not in steps(backend)


def test_a_slow_opening_is_not_waited_for_either(tmp_path, monkeypatch):
    class Slow(Remote):
        def __init__(self, run):
            time.sleep(1)
            super().__init__(run)
            there.append(self)

    there = []
    monkeypatch.setitem(BACKENDS, "slow", Slow)
    start = time.perf_counter()
    tracking = Tracking("p", "e", "slow")
    tracking.log({"x": 1.0}, 0)
    assert time.perf_counter() - start < 0.5 and tracking.backends == []
    tracking.finish()
    assert steps(there[0]) == [0, "closed"]


def test_two_that_hang_share_the_end_of_a_run(tmp_path, monkeypatch):
    class Hanging(Remote):
        def log(self, data, step):
            time.sleep(30)

    class Other(Hanging):
        pass

    monkeypatch.setattr(tracker, "FLUSH_S", 1.0)
    monkeypatch.setitem(BACKENDS, "one", Hanging)
    monkeypatch.setitem(BACKENDS, "two", Other)
    tracking = Tracking("p", "e", ["one", "two"])
    tracking.log({"x": 1.0}, 0)
    start = time.perf_counter()
    tracking.finish()
    assert 0.9 < time.perf_counter() - start < 2


def test_what_does_not_fit_is_dropped_and_counted(caplog):
    backend = Remote()
    queued = Queued("remote", lambda: backend, capacity=3)
    assert queued.flush(10)
    backend.gate.clear()
    for step in range(8):
        queued.put(f"step {step}", lambda open, step=step: open.log({}, step))
    assert caplog.text.count("3 entries behind: step 3 and what follows is dropped") == 1
    backend.gate.set()
    assert queued.flush(10)
    queued.put("step 8", lambda open: open.log({}, 8))
    assert "takes entries again, step 8 first: the 5 before it were dropped" in caplog.text
    queued.stop()
    queued.join(10)
    assert steps(backend) == [0, 1, 2, 8, "closed"]


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("500"), SystemExit(1)])
def test_an_error_is_said_once_and_ends_nothing(remote, caplog, error):
    tracking = Tracking("p", "e", "remote")
    backend = opened(remote, tracking)
    backend.error = error
    for step in range(3):
        tracking.log({"x": 1.0}, step)
    assert tracking.flush(10)
    backend.error = None
    tracking.log({"x": 1.0}, 3)
    tracking.finish()
    assert steps(backend) == [3, "closed"]
    name = re.escape(f"{type(error).__name__}: {error}")
    assert len(re.findall(rf"remote could not take step 0 \({name}\): the run goes on", caplog.text)) == 1
    assert "remote works again, from step 3 on; 3 entries before were lost" in caplog.text
    assert len(caplog.records) == 2


def test_one_that_cannot_be_opened_is_out(caplog, tmp_path, monkeypatch):
    class Broken(Remote):
        def __init__(self, run):
            raise ValueError("no such project")

    monkeypatch.setitem(BACKENDS, "broken", Broken)
    with Tracking("p", "e", ["broken", "file"], log_dir=tmp_path) as tracking:
        for step in range(3):
            tracking.log({"x": 1.0}, step)
            time.sleep(0.05)
        assert tracking.flush(1)
    assert "broken could not be opened (ValueError: no such project): the run goes on without it" in caplog.text
    assert len(caplog.records) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_fails_at_the_end_is_said(remote, caplog):
    tracking = Tracking("p", "e", "remote")
    opened(remote, tracking).error = RuntimeError("late")
    tracking.finish()
    assert "remote could not be closed (RuntimeError: late)" in caplog.text


def test_one_that_is_at_one_entry_for_long_is_named(remote, caplog, monkeypatch):
    monkeypatch.setattr("verl.utils.tracking.queued.LONG_S", 0.1)
    tracking = Tracking("p", "e", "remote")
    backend = opened(remote, tracking)
    backend.gate.clear()
    for step in range(5):
        tracking.log({"x": 1.0}, step)
        time.sleep(0.1)
    backend.gate.set()
    tracking.finish()
    assert len(re.findall(r"remote is at one entry for .*; the run does not wait for it", caplog.text)) == 1


def test_errors_of_local_ones_end_nothing_either(tmp_path, caplog, monkeypatch):
    class Local(Remote):
        remote = False

        def __init__(self, run):
            raise PermissionError("not yours")

    class Odd(Remote):
        remote = False

        def log(self, data, step):
            raise ValueError("odd")

    monkeypatch.setitem(BACKENDS, "local", Local)
    monkeypatch.setitem(BACKENDS, "odd", Odd)
    with Tracking("p", "e", ["local", "odd", "file"], log_dir=tmp_path) as tracking:
        tracking.log({"x": 1.0}, 0)
        tracking.log({"x": 1.0}, 1)
    assert "Local could not be opened (not yours): the run goes on without it" in caplog.text
    assert caplog.text.count("Odd could not write step 0 (ValueError: odd)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# ---- the real thing, with nobody at the other end


@pytest.fixture
def silent_server():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


RUN = """
import logging, sys, time
from verl.utils.tracking import Tracking, ending_in_time, tracker

logging.basicConfig(level=logging.INFO, format="%(message)s")
tracker.FLUSH_S = 3.0
longest = 0.0
with ending_in_time(), Tracking("p", "e", [sys.argv[1], "file"], log_dir=sys.argv[2]) as tracking:
    for step in range(20):
        start = time.perf_counter()
        tracking.log({f"x/{number}": 1.0 for number in range(100)}, step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.05)
    print(f"LONGEST {longest:.4f}", flush=True)
    sys.exit(7)
"""
SERVERS = {
    "wandb": ("WANDB_BASE_URL", {"WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}),
    "mlflow": ("MLFLOW_TRACKING_URI", {}),
    "swanlab": ("SWANLAB_API_HOST", {"SWANLAB_API_KEY": "0" * 20}),
    "trackio": ("TRACKIO_SERVER_URL", {"TRACKIO_WRITE_TOKEN": "token"}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_real_tracker_whose_server_is_silent(name, silent_server, tmp_path):
    """The process ends within its time with its own exit code, and its steps went on."""
    pytest.importorskip(name)
    variable, more = SERVERS[name]
    environment = {
        **os.environ, **more, variable: silent_server, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path[1:]]),
        "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path),
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, str(tmp_path)],
        env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    print(f"{name}: {time.monotonic() - start:.0f} s", done.stdout, done.stderr)
    assert done.returncode == 7
    # Imports, 3 s for what is left and 10 for the end.
    assert time.monotonic() - start < 60
    # While a package is imported, threads take turns.
    assert float(done.stdout.rpartition("LONGEST ")[2]) < 5
    assert f"trainer.logger {name} has not ended in time" in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20
