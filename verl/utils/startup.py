"""What the time from a command to its first step went to: phases with their seconds, kept from the first line on.

Every process keeps its own; the driver's begins with its command (`begin`) and is asked for once (`conclude`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Phase(NamedTuple):
    """A stretch of time.

    depth: of how many others it is a part.
    beside: it went on beside the others, in a thread of its own, so that its seconds are not part of their sum.
    """

    what: str
    seconds: float
    depth: int
    beside: bool = False


class _Record:
    """The phases of this process, and when its start began and ended (seconds since the epoch)."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.beside: list[Phase] = []
        self.began: float | None = None
        self.over = False
        self.depth = 0


_record = _Record()


def begin(at: float | None = None) -> None:
    """A start begins, now or at that time (seconds since the epoch). One that is not concluded goes on."""
    global _record
    if _record.began is None or _record.over:
        _record = _Record()
        _record.began = time.time() if at is None else at


def note(what: str, seconds: float) -> None:
    """Keep a phase that has been measured elsewhere."""
    if not _record.over:
        _record.phases.append(Phase(what, seconds, _record.depth))


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Keep the block as a phase of the start; what comes again is no part of it."""
    record, start = _record, time.monotonic()
    if record.over or any(phase.what == what for phase in record.phases):
        yield
        return
    place = len(record.phases)
    record.depth += 1
    try:
        yield
    finally:
        record.depth -= 1
        # Before its own parts.
        record.phases.insert(place, Phase(what, time.monotonic() - start, record.depth))


@contextmanager
def noted_beside(what: str) -> Iterator[None]:
    """Keep the block, in a thread of its own, as a phase beside those of the others."""
    record, start = _record, time.monotonic()
    try:
        yield
    finally:
        if not record.over:
            record.beside.append(Phase(what, time.monotonic() - start, 0, beside=True))


def phases() -> list[Phase]:
    """Those kept so far, in their order, and then those beside them."""
    return [*_record.phases, *_record.beside]


def conclude() -> tuple[float, list[Phase]] | None:
    """The start is over: the seconds that it took, and its phases. None if none had begun, or it was over before."""
    if _record.began is None or _record.over:
        return None
    _record.over = True
    return time.time() - _record.began, phases()
