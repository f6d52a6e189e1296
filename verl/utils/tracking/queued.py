"""A tracker in a thread of its own, so that no step waits for it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from verl.utils.stalls import duration, end_children
from verl.utils.tracking.base import Backend

logger = logging.getLogger(__name__)

# Entries that wait at most: some hundred steps, a few MB.
CAPACITY = 1000
# A tracker that is so many seconds at one entry is named.
LONG_S = 300.0


# Seconds that a process takes at most to end, once a tracker was given up: its library may wait for ever.
ENDS_S = 10.0
_given_up: list[str] = []


@contextmanager
def ending_in_time() -> Iterator[None]:
    """For a process' main function: where a tracker was given up, the process ends soon after the block, with the exit
    code that it would have had, whatever that tracker's library still waits for."""
    code = 0
    try:
        yield
    except SystemExit as end:
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        raise
    except BaseException:
        code = 1
        raise
    finally:
        if _given_up:
            threading.Thread(target=_leave, args=(code,), name="end of the process", daemon=True).start()


def _leave(code: int) -> None:
    time.sleep(ENDS_S)
    logger.error("the process ends without %s, which still waits", ", ".join(_given_up))
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    # Such as W&B's, which keeps the terminal open. What it was given is in its folder, for `wandb sync`.
    end_children()
    os._exit(code)


class _Entry(NamedTuple):
    what: str
    write: Callable[[Backend], None]


class Queued:
    """Builds, calls and closes a backend in one thread, entry after entry in the order that they came.

    What it raises is said and ends nothing; the entry is lost, and the next one is tried. One that cannot be built is
    out for the whole run. While as many entries wait as may, further ones are dropped, and counted.

    Args:
        name: what `trainer.logger` calls it.
        build: makes the backend.
        capacity: entries that may wait.
    """

    def __init__(self, name: str, build: Callable[[], Backend], capacity: int = CAPACITY):
        self.name, self.capacity = name, capacity
        self.backend: Backend | None = None
        self._build = build
        self._waiting: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._dropped = self._lost = 0
        self._since: float | None = None
        self._closing = self._out = self._slow = False
        self._thread = threading.Thread(target=self._work, name=f"trainer.logger {name}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the run's side

    def put(self, what: str, write: Callable[[Backend], None]) -> None:
        """Leave an entry for the backend; returns at once."""
        with self._changed:
            if self._out or self._closing:
                return
            self._name_if_slow()
            if len(self._waiting) >= self.capacity:
                if not self._dropped:
                    logger.error(
                        "trainer.logger %s is %d entries behind: %s and what follows is dropped until it catches up",
                        self.name, self.capacity, what,
                    )  # fmt: skip
                self._dropped += 1
                return
            if self._dropped:
                logger.warning(
                    "trainer.logger %s takes entries again, %s first: the %d before it were dropped",
                    self.name, what, self._dropped,
                )  # fmt: skip
                self._dropped = 0
            self._waiting.append(_Entry(what, write))
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until the backend is open and has taken all entries; whether it has within so many seconds."""
        with self._changed:
            taken = self._changed.wait_for(lambda: self._out or (self.backend and not self._waiting), seconds)
        return bool(taken)

    def stop(self) -> None:
        """Let the thread end after the last entry; returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, and say what is lost if it has not come within so many seconds."""
        self._thread.join(max(0.0, seconds))
        with self._changed:
            if not self._out:
                self._out = True
                _given_up.append(self.name)
                left = len(self._waiting) + self._dropped
                logger.error(
                    "trainer.logger %s has not ended in time: the run ends without its last %d entries", self.name, left
                )

    def _name_if_slow(self) -> None:
        if self._since is None or self._slow:
            return
        passed = time.monotonic() - self._since
        if passed > LONG_S:
            self._slow = True
            logger.warning(
                "trainer.logger %s is at one entry for %s; the run does not wait for it", self.name, duration(passed)
            )

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        if self._guarded("be opened", self._open):
            while (entry := self._next()) is not None:
                self._take(entry)
            if not self._out:
                self._guarded("be closed", lambda: self.backend.close())
        with self._changed:
            self._out = True
            self._waiting.clear()
            self._changed.notify_all()

    def _open(self) -> None:
        self._since = time.monotonic()
        backend = self._build()
        with self._changed:
            self.backend = backend
            self._changed.notify_all()

    def _guarded(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:
            if not self._out:
                logger.error(
                    "trainer.logger %s could not %s (%s: %s): the run goes on without it",
                    self.name, what, type(error).__name__, error,
                )  # fmt: skip
            return False
        return True

    def _next(self) -> _Entry | None:
        """The oldest entry, which stays in line until it is written; None at the end."""
        with self._changed:
            self._since, self._slow = None, False
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._out or not self._waiting:
                return None
            self._since = time.monotonic()
            return self._waiting[0]

    def _take(self, entry: _Entry) -> None:
        try:
            entry.write(self.backend)
        except (Exception, SystemExit) as error:
            if not self._lost:
                logger.error(
                    "trainer.logger %s could not take %s (%s: %s): the run goes on, and the next one is tried",
                    self.name, entry.what, type(error).__name__, error,
                )  # fmt: skip
            self._lost += 1
        else:
            if self._lost:
                logger.warning(
                    "trainer.logger %s works again, from %s on; %d entries before were lost",
                    self.name, entry.what, self._lost,
                )  # fmt: skip
            self._lost = 0
        with self._changed:
            # Not by value: what was given up is gone already.
            if self._waiting and self._waiting[0] is entry:
                self._waiting.popleft()
            self._changed.notify_all()
