"""One run at a time in a folder: two would delete each other's half-written checkpoints and mix their logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK = "run.lock"


def check_writable(folder: Path, setting: str) -> None:
    """Make the folder, if it is not there, and a file in it that goes again.

    Raises:
        OSError: either fails; names the setting that the folder is from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{setting}: {folder} cannot be written ({why}): choose another folder") from error


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if it is not there; the system gives it back however the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be written.
    """
    check_writable(folder, "trainer.default_local_dir")
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
