"""What the driver waits for, and for how long: named when it takes long, ended when it takes too long.

with StallWatch(warning=600, timeout=7200).at_work():
    with doing("reading the next batch"):
        ...
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import psutil

from verl.utils.background import Background
from verl.utils.signals import Interruption
from verl.utils.stacks import ASK, own_stacks

logger = logging.getLogger(__name__)

# What is told to end gets this long, before the process ends without it.
GIVE_UP_S = 60.0
# And the ranks this long to say where they are, on all nodes.
REPORTS_S = 120.0
LONGEST_LOOK_S = 10.0
OFF = -1
# As it is here: while a user's code is at work, which may be what stalls, os._exit is another (`cannot_end_the_run`).
_exit = os._exit


class StallError(RuntimeError):
    """What the driver waited for did not come within `trainer.stall_timeout`."""


class _Stalled(Interruption):
    """Where the driver is, when it is told to end."""


class Witness(Protocol):
    """Processes that can be asked where they are."""

    def reports(self) -> list[str]:
        """A text for each of them."""
        ...


# What this process is at, which has one loop, and how often anything began or ended: time is counted from there.
_sentences: list[Callable[[], str]] = []
_turns = 0
# The thread that is watched, if any is. What others do beside it keeps nobody waiting.
_watched: int | None = None
# What the watched thread has been told to end by.
_ended_by: _Stalled | None = None
witnesses: weakref.WeakSet[Witness] = weakref.WeakSet()


@contextmanager
def waiting(sentence: str | Callable[[], str]) -> Iterator[None]:
    """Within the block this process is at what the sentence says, which a duration follows: "rank 1 of 2 has not
    answered update_actor".

    Of blocks within blocks the innermost counts; when it ends, the outer one's time begins anew. In another thread than
    the one that is watched a block says nothing.
    """
    global _turns
    if _watched != threading.get_ident():
        yield
        return
    _turns += 1
    _sentences.append(sentence if callable(sentence) else lambda: sentence)
    before = _ended_by
    try:
        yield
    finally:
        _sentences.pop()
        _turns += 1
    if _ended_by is not before:
        # A bare `except:` within has taken it for an error of its own.
        raise _ended_by


def doing(what: str) -> AbstractContextManager[None]:
    """`waiting` for something to be done: "{what} has not ended"."""
    return waiting(f"{what} has not ended")


class StallWatch:
    """Looks at what this process is at, from a thread of its own.

    Args:
        warning: seconds after which it is named, then again after twice as many, and so on; -1: never.
        timeout: seconds after which all stacks are logged and `at_work` ends with a StallError; -1: never.
    """

    def __init__(self, warning: float, timeout: float):
        self.warning, self.timeout = warning, timeout
        limits = [seconds for seconds in (warning, timeout) if seconds != OFF]
        self._tick = min(LONGEST_LOOK_S, min(limits, default=0) / 10)
        self._over = threading.Event()
        self._error: StallError | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Watch within the block.

        Outside the main thread, which alone can be interrupted, a stall is named and its stacks logged, and nothing
        ends.

        Raises:
            StallError: something took too long.
        """
        global _watched, _ended_by
        if not self._tick:
            yield
            return
        _watched = threading.get_ident()
        self._in_main = threading.current_thread() is threading.main_thread()
        watching = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        with self._signals():
            watching.start()
            try:
                yield
            except KeyboardInterrupt:
                # Ray raises one of its own where a handler raised within its calls.
                if self._error is None:
                    raise
                raise self._error from None
            finally:
                self._over.set()
                _watched = _ended_by = None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if not self._in_main:
            yield
            return
        before = {number: signal.getsignal(number) for number in (ASK, signal.SIGVTALRM)}
        signal.signal(ASK, self._interrupt)
        # A regular expression that runs wild holds the interpreter's lock, and the watch would never get its turn. But
        # it looks after signals now and then, and a handler gives the lock away. The clock is that of the CPU spent.
        signal.signal(signal.SIGVTALRM, lambda number, frame: time.sleep(0.001))
        signal.siginterrupt(signal.SIGVTALRM, False)
        signal.setitimer(signal.ITIMER_VIRTUAL, self._tick, self._tick)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _interrupt(self, number: int, frame: object) -> None:
        global _ended_by
        if self._error is not None and not self._over.is_set():
            _ended_by = _Stalled(str(self._error))
            raise _ended_by

    def _watch(self) -> None:
        turn, passed, due, last = _turns, 0.0, self.warning, time.monotonic()
        while not self._over.wait(self._tick):
            now = time.monotonic()
            # While this process was stopped or the machine slept, nobody kept it waiting.
            passed, last = passed + min(now - last, 2 * self._tick), now
            # In one piece: the watched thread may end a block meanwhile.
            sentence = next(iter(_sentences[-1:]), None)
            if turn != _turns:
                turn, passed, due = _turns, 0.0, self.warning
            if sentence is None:
                continue
            if self.timeout != OFF and passed >= self.timeout:
                if self._end(turn, f"{sentence()} for {duration(passed)}"):
                    return
            elif self.warning != OFF and passed >= due:
                due *= 2
                logger.warning("%s for %s", sentence(), duration(passed))

    def _end(self, turn: int, sentence: str) -> bool:
        """Log all stacks and interrupt the main thread; False where that has gone on meanwhile."""
        logger.error("%s. Where everything is, the innermost call first:\n%s", sentence, all_stacks())
        if _turns != turn:
            logger.warning("it went on meanwhile, and so does the run")
            return False
        if not self._in_main:
            return True
        self._error = StallError(
            f"{sentence}, which is more than trainer.stall_timeout={self.timeout:g} s allows; the log has the stacks "
            "of all ranks. Raise it if that can take so long"
        )
        signal.pthread_kill(threading.main_thread().ident, ASK)
        if not self._over.wait(GIVE_UP_S):
            self._leave()
        return True

    def _leave(self) -> None:
        """End the process and those that it has started. It is in code that no exception gets it out of."""
        logger.critical("%s. It did not end when told to, and the process ends without it", self._error)
        try:
            end_children()
        finally:
            _exit(1)


def end_children() -> None:
    """Kill the processes that this one has started, and those that they have; return when they are gone."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=5)


def all_stacks() -> str:
    """Those of all witnesses' processes and of this one."""
    texts = [text for witness in list(witnesses) for text in _reports_of(witness)]
    return "\n\n".join([*texts, f"the driver, process {os.getpid()}:\n{own_stacks()}"])


def _reports_of(witness: Witness) -> list[str]:
    """A witness's reports, or why there are none: whatever is wrong with it, the run ends."""
    reports: list[str] = []
    asking = Background(lambda: reports.extend(witness.reports()), "asking for stacks")
    asking.join(REPORTS_S)
    if asking.at_work:
        return [f"a group of ranks could not be asked within {REPORTS_S:.0f} s"]
    try:
        asking.wait()
    except Exception as error:
        return [f"a group of ranks could not be asked: {type(error).__name__}: {error}"]
    return reports


def duration(seconds: float) -> str:
    """For people: 45 s, 10 min, 2.5 h."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size or seconds == size:
            return f"{round(seconds / size, 1):g} {name}"
    return f"{seconds:.0f} s"
