"""Signals that end a run: SIGTERM, SIGINT and SIGHUP, at the end of the step at hand or at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Who signals a process and then its group (`timeout`) means it once.
ONE_ORDER_S = 1.0
FIRST_SAID = "the run ends after this step, with a checkpoint; a second signal ends it at once"


class Interruption(KeyboardInterrupt):
    """What a handler of the run's own raises, through whatever the main thread is at.

    A KeyboardInterrupt, because Ray aborts the process when a handler raises anything else within one of its calls.
    """


class EndedBySignal(Interruption):
    """The run has ended because it was told to."""

    def __init__(self, number: int):
        self.number = signal.Signals(number)
        super().__init__(f"ended by {self.number.name}")

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + self.number


class RunSignals:
    """The signals that a run gets, and what is made of them: nothing, until `taken`."""

    def __init__(self) -> None:
        # The first of them.
        self.received: signal.Signals | None = None
        self._waits = self._ends = False
        self._said = FIRST_SAID
        self._latest: tuple[int, float] = (0, 0.0)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within the block a signal ends the block, or what `at_step_ends` encloses; its end then raises EndedBySignal.

        Outside the main thread, which alone gets signals, nothing changes; nor for signals that are ignored, as SIGHUP
        is under nohup.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in ENDING}
        # None: a handler that is not Python's.
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        except KeyboardInterrupt:
            if self.received is None:
                raise
            # Ray raises one of its own where the handler raised within its calls.
            raise EndedBySignal(self.received) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            raise EndedBySignal(self.received)

    def obey(self) -> None:
        """Raise EndedBySignal if a signal should have ended what was being done, and something made nothing of it."""
        if self.received is not None:
            raise EndedBySignal(self.received)

    @contextmanager
    def at_step_ends(self, waits: bool, said: str = FIRST_SAID) -> Iterator[None]:
        """Within the block, where it `waits`, a first signal is noted in `received`, for the loop to ask after it, and
        the user is told what is `said`."""
        self._waits, self._said = waits, said
        try:
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: object) -> None:
        (latest, when), now = self._latest, time.monotonic()
        self._latest = number, now
        if number == latest and now - when < ONE_ORDER_S:
            return
        first, self.received = self.received is None, self.received or signal.Signals(number)
        if first and self._waits:
            # What is said by other means may be in the middle of a line of its own; nobody may be there to read it.
            with suppress(OSError):
                os.write(2, f"\n{self.received.name}: {self._said}\n".encode())
            return
        if self._ends:
            # Whatever keeps the end from coming: the system obeys.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._ends = True
        raise EndedBySignal(self.received)


@contextmanager
def out_of_reach() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP wait, and what is started there never gets them.

    For Ray: its processes are in the driver's group, and who ends a whole group or job (`timeout`, systemd, Slurm)
    would take them from a driver that still has to save. Ray's own handler of SIGTERM is taken back.
    """
    held = {signal.SIGTERM, signal.SIGHUP}
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
