"""Room on the disk: looked at before a checkpoint is written, and spoken of when there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.utils.units import GIB

FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = (
    "make room, let fewer be kept (trainer.max_actor_ckpt_to_keep, trainer.max_critic_ckpt_to_keep), or put "
    "trainer.default_local_dir elsewhere; the checkpoints that are there are untouched"
)


def bytes_in(folder: Path) -> int:
    """The bytes that all files in a folder take on the disk, whole blocks of it."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(max(stat.st_size, stat.st_blocks * 512) for stat in stats)


def check_room(folder: Path, need: int) -> None:
    """Look whether so many bytes fit into a folder, which is made if it is not there.

    Raises:
        OSError: they do not; names folder, need and room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    if room < need:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {_amount(need)} and {folder} has room for {_amount(room)}: {_ADVICE}",
            str(folder),
        )


def _amount(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """An error within the block that comes of a full disk, on whatever rank, becomes an OSError that names the folder
    written to."""
    try:
        yield
    except Exception as error:
        if not _comes_of_a_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, f"the disk is full: {_ADVICE}", str(folder)) from error


def _comes_of_a_full_disk(error: BaseException | None) -> bool:
    """A rank's error arrives as text; those of libraries have the system's words in theirs."""
    while error is not None:
        words = str(error)
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in words for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
