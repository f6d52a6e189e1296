"""What a run says while it works: what its user can act on goes to the terminal, everything to files in `logs/`.

logs/driver.log   the driver's own log, with that of every library
logs/ranks.log    what the ranks print (`verl/single_controller/ray/output.py`)
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from verl.utils.console import PrintableFormatter
from verl.utils.signals import EndedBySignal
from verl.utils.stalls import duration
from verl.utils.startup import noted

logger = logging.getLogger(__name__)

FOLDER, DRIVER, RANKS = "logs", "driver.log", "ranks.log"
# Warnings of libraries about what is meant so, and of kernels that nothing here asks for.
EXPECTED = ("Token authentication is enabled", "Failed to load CPU gemm_4bit_forward")
# What took less is not mentioned a second time: the lines' own times say it.
SOON_S = 10


class TerminalFormatter(PrintableFormatter):
    """Time and sentence; of what is more than information, level and logger too."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._of_warnings = PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return self._of_warnings.format(record) if record.levelno > logging.INFO else super().format(record)


class TerminalHandler(logging.StreamHandler):
    """Standard error: this package's log, and the warnings of libraries. A progress bar stays below it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(TerminalFormatter())
        self.addFilter(self._is_for_users)

    @staticmethod
    def _is_for_users(record: logging.LogRecord) -> bool:
        if record.name.split(".")[0] in ("verl", "__main__"):
            return True
        return record.levelno >= logging.WARNING and not record.getMessage().startswith(EXPECTED)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class DriverFile(logging.FileHandler):
    """A file for every line. One that cannot be written, on a full disk for instance, ends no run; it is said once."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self._failing:
            self._failing = True
            logger.warning("%s cannot be written (%s): the run goes on", self.baseFilename, error)


def log_to_terminal() -> None:
    """Send the log to the terminal, Ray's too."""
    logging.basicConfig(level=logging.INFO, handlers=[TerminalHandler()], force=True)
    # Ray gives its logger a handler of its own when it is imported.
    of_ray = logging.getLogger("ray")
    of_ray.handlers.clear()
    of_ray.propagate = True


@contextmanager
def log_to(run: Path) -> Iterator[None]:
    """Within the block keep the log in the run's folder, with the traceback of what ends it."""
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        file = DriverFile(folder / DRIVER)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the run goes on without", folder, error)
        yield
        return
    logging.getLogger().addHandler(file)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, EndedBySignal):
            text = "".join(traceback.format_exception(error))
            file.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None))
            if (folder / RANKS).exists():
                logger.error("the run failed; %s has what its ranks printed", folder / RANKS)
        raise
    finally:
        logging.getLogger().removeHandler(file)
        # What a full disk has not taken is tried once more.
        with suppress(OSError):
            file.close()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say that something begins, and once it has ended how long it took, unless that was no time. Before the first step
    it is a phase of the start too."""
    logger.info("%s ...", what)
    start = time.monotonic()
    with noted(what):
        yield
    seconds = time.monotonic() - start
    if seconds >= SOON_S:
        logger.info("%s: done in %s", what, duration(seconds))
