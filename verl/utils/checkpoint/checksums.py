"""CRC-32 checksums of files, several files at a time; on long work a bar shows how far it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from verl.utils.units import GIB

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
BLOCK = 1 << 24
# What is said to the log as well, where no bar is seen.
LONG = 4 * 2**30
# What some network file systems answer, to folders above all; a failing disk answers otherwise.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def read_checksums(file: Path) -> dict[str, int]:
    """Name and checksum of each file; ValueError names a file that holds something else."""
    try:
        sums = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON, got {error}") from error
    if not isinstance(sums, dict) or not all(isinstance(value, int) for value in sums.values()):
        raise ValueError(f"{file} is damaged: expected a checksum for each file name")
    return sums


def write_checksums(file: Path, sums: dict[str, int]) -> None:
    """Write what `read_checksums` reads, to stay after a loss of power."""
    file.write_text(json.dumps(sums, indent=1))
    sync_to_disk(file)


def sync_to_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names, where the file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def checksum(file: Path, count: Callable[[int], object] = lambda size: None, sync: bool = False) -> int:
    """CRC-32 of a file's content; `count` is told of every block's bytes, and `sync` has the disk take it first."""
    value = 0
    with file.open("rb") as stream:
        if sync:
            _sync(stream.fileno())
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
            count(len(block))
    return value


def checksums_of(folder: Path, names: Iterable[str], sync: bool = False, shown: bool = True) -> dict[str, int]:
    """Checksums of files by their names in `folder`.

    Args:
        sync: have the disk take each file first.
        shown: with a bar, where somebody watches and it takes longer than a few seconds.
    """
    names = list(names)
    total = sum((folder / name).stat().st_size for name in names)
    says = logger.info if shown and total >= LONG else logger.debug
    says("checking %.1f GiB of %s", total / GIB, folder)
    start = time.monotonic()
    # disable=None: no bar where nobody watches.
    with (
        tqdm(total=total, desc=f"checking {folder.name}", unit="B", unit_scale=True, delay=3, leave=False,
             dynamic_ncols=True, disable=None if shown else True) as bar,
        ThreadPoolExecutor(max_workers=8) as pool,
    ):  # fmt: skip
        sums = pool.map(lambda name: checksum(folder / name, bar.update, sync), names)
        result = dict(zip(names, sums, strict=True))
    says("checked %s in %.1f s", folder, time.monotonic() - start)
    return result
