"""The pipeline's processes, one at a time: they get its signals, and do not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from verl.utils.command_line import for_children
from verl.utils.console import say
from verl.utils.run_lock import LOCK
from verl.utils.signals import ENDING, EndedBySignal

# prctl(2): the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
# A trainer that lost its pipeline makes its step and saves; one that takes longer is named and not waited for.
ORPHAN_S = 600.0
LOOK_S = 0.5


class Processes:
    """Starts processes and waits for them.

    Within `signals_taken`, SIGTERM, SIGINT and SIGHUP are handed on to the process at work; without one they raise
    EndedBySignal.
    """

    def __init__(self) -> None:
        # The first signal that came.
        self.received: signal.Signals | None = None
        self._process: subprocess.Popen | None = None
        self._starting = False

    @contextmanager
    def signals_taken(self) -> Iterator[None]:
        """Outside the main thread, which alone gets signals, nothing changes; nor for signals that are ignored."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in ENDING}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number)
        if self._process is not None:
            self._hand_on(number)
        elif not self._starting:
            raise EndedBySignal(number)

    def _hand_on(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def run(self, *module: str) -> int:
        """Run `python -m MODULE ...` with this process' terminal; returns its exit code, 128 and the number where a
        signal ended it.

        Raises:
            EndedBySignal: this process was told to end, and it ended well before it heard of it.
        """
        self._starting = True
        self._process = subprocess.Popen(
            [sys.executable, "-m", *module],
            env=os.environ | for_children(),
            preexec_fn=_ends_with_its_parent(os.getpid()),
        )
        self._starting = False
        if self.received is not None:
            self._hand_on(self.received)
        try:
            code = self._process.wait()
        finally:
            self._process = None
        if self.received is not None and code == 0:
            raise EndedBySignal(self.received)
        return code if code >= 0 else 128 - code


def _ends_with_its_parent(parent: int) -> Callable[[], None] | None:
    """To be called in a new process: SIGTERM when `parent` ends, however it does. Where the system cannot say so,
    nothing."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def call() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return call


def wait_until_left(run: Path, patience: float = ORPHAN_S) -> None:
    """Return when no trainer holds a run's folder: one whose pipeline was killed may still be saving.

    Raises:
        BlockingIOError: one holds it for longer than `patience` seconds.
    """
    if not (run / LOCK).exists():
        return
    deadline, said = time.monotonic() + patience, False
    while True:
        try:
            with FileLock(run / LOCK, timeout=0):
                return
        except Timeout as error:
            if time.monotonic() > deadline:
                raise BlockingIOError(
                    f"a trainer is at work in {run} and does not end: see what it does, end it, and start again"
                ) from error
        except (NotImplementedError, OSError):
            # No file system that knows locks: nobody holds one.
            return
        if not said:
            say(f"a trainer that an earlier pipeline has started is still at work in {run}: waiting for its end")
            said = True
        time.sleep(LOOK_S)
