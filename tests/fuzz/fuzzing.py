"""How much is tried, how long a try may take, and which errors a user may meet."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings

import verl
from verl.trainer.config import ConfigError

# How many times as much as in the suite, and then anything, not always the same.
FACTOR = int(os.environ.get("FUZZ", "1"))
# A try takes a few tenths of a second; a machine may be busy.
DEADLINE_S = 60

# The errors that say what is wrong: settings; contents; files and folders; weights. Subclasses are not among them:
# json's and unicode's errors are ValueErrors too, and name no file.
REFUSALS = (
    ConfigError,
    ValueError,
    FileNotFoundError,
    FileExistsError,
    BlockingIOError,
    OSError,
    FloatingPointError,
)
SOURCES = str(Path(verl.__file__).parent)


def tries(number: int) -> settings:
    """So many in the suite, the same ones each time."""
    return settings(
        max_examples=number * FACTOR, derandomize=FACTOR == 1, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def is_refusal(error: BaseException) -> bool:
    """Whether it is of one of these classes, from a `raise` of the trainer's own, and reads as a sentence.

    The system's own words for a file that it does not give (no permission, a broken disk) do too, as they name it.
    """
    if type(error) not in REFUSALS:
        return isinstance(error, PermissionError) and error.filename is not None
    *_, last = traceback.extract_tb(error.__traceback__)
    raised = last.filename.startswith(SOURCES) and (last.line or "").lstrip().startswith("raise")
    return raised and len(str(error).split()) > 3


@contextmanager
def within_the_deadline() -> Iterator[None]:
    """AssertionError where the inside takes too long."""

    def say(number, frame):
        raise AssertionError(f"no end within {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, say)
    left, interval = signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        # Another's timer (pytest-timeout's) goes on.
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def refused_or(work: Callable[[], object]) -> object:
    """What it returns, or None where it is refused with a sentence; any other error is the test's."""
    with within_the_deadline():
        try:
            return work()
        except Exception as error:
            if not is_refusal(error):
                raise
            return None
