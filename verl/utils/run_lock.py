"""One run at a time in a folder: two would delete each other's half-written checkpoints and mix their logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK = "run.lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there; the system gives it back however the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another run is at work in {folder} and holds {LOCK} there: wait for it or stop it, or give this one a "
            "folder of its own (trainer.experiment_name, --exp_name, or trainer.default_local_dir)"
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): see to it that no other run works there", folder, error)
    try:
        yield
    finally:
        lock.release()
