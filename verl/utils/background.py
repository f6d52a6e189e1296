"""Work in a thread beside the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One piece of work, begun at once. It never keeps the process from ending: who needs it done waits for it."""

    def __init__(self, work: Callable[[], None], name: str):
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    @property
    def at_work(self) -> bool:
        """Whether it has not come to its end yet."""
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Return once it has come to its end, well or not, or after so many seconds."""
        self._thread.join(seconds)

    def wait(self) -> None:
        """Return once it is done. Raises what the work raised."""
        self.join()
        if self._error is not None:
            raise self._error
