"""Signals, noted for whoever looks."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from verl.utils.signals import ENDING, ONE_ORDER_S, EndedBySignal


class Orders:
    """Signals that this process got and nobody has taken yet. The same one within a second counts once."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._latest: tuple[int, float] = (0, 0.0)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block signals are noted; those that are ignored, as SIGHUP is under nohup, stay so."""
        before = {number: signal.getsignal(number) for number in ENDING}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take(self) -> int | None:
        """The oldest of them."""
        return self._waiting.pop(0) if self._waiting else None

    def stop_if_any(self) -> None:
        """EndedBySignal if there is one: for as long as nothing is there yet that could save."""
        number = self.take()
        if number is not None:
            raise EndedBySignal(number)

    def _note(self, number: int, frame: object) -> None:
        (latest, when), now = self._latest, time.monotonic()
        self._latest = number, now
        if number != latest or now - when >= ONE_ORDER_S:
            self._waiting.append(number)
