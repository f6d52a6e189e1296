"""How far long work has come, where somebody watches and where a log is read afterwards."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from verl.utils.console import printable
from verl.utils.stalls import duration

# Between two lines of a log.
EVERY_S = 60.0


class Progress:
    """`total` units of what: a bar on a terminal; elsewhere a line on standard error once a minute and at the end."""

    def __init__(self, total: int, what: str, unit: str):
        self.total, self.what, self.unit = total, what, unit
        self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, disable=None)
        self._to_log = self._bar.disable
        self._done, self._begun = 0, time.monotonic()
        self._said = self._begun

    def update(self, done: int = 1) -> None:
        """So many more."""
        self._bar.update(done)
        self._done += done
        if self._done < self.total and time.monotonic() - self._said >= EVERY_S:
            self._say()

    def _say(self) -> None:
        if self._to_log and self.total:
            self._said = time.monotonic()
            so_far = f"{self._done} of {self.total} {self.unit}s in {duration(self._said - self._begun)}"
            print(printable(f"{self.what}: {so_far}"), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        self._say()
