"""Room on the disk: looked at before a checkpoint is written, and spoken of when there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def check_room(folder: Path, need: int, freed: int = 0) -> None:
    """Look whether so many bytes fit into a folder, which is made if it is not there.

    Args:
        freed: bytes that will be removed from there before.

    Raises:
        OSError: they do not; names folder, need and room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = free_in(folder) + freed
    if room < need:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {amount(need)} and {folder} has room for {amount(room)}: {_ADVICE}",
            str(folder),
        )


def free_in(folder: Path) -> int:
    """The bytes that this user may still write there."""
    return shutil.disk_usage(folder).free


def amount(size: int) -> str:
    """A number of bytes, in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


@dataclass(frozen=True)
class Part:
    """One model in a run's checkpoints.

    size: its bytes in one of them.
    keep: how many of the last ones keep it; None: all.
    """

    size: int
    keep: int | None


def most_on_disk(parts: Collection[Part], there: int, to_come: int, best: bool) -> int:
    """The bytes of a run's checkpoints when there are most of them: those kept, the newest beside them while it is
    written, and the best.

    Args:
        there: the checkpoints that are there already.
        to_come: those that the run will write.
        best: whether one is kept for being the best.
    """
    every = there + to_come
    counts = [every if part.keep is None else min(every, part.keep + 1) for part in parts]
    return sum(part.size * (count + best) for part, count in zip(parts, counts, strict=True))


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
