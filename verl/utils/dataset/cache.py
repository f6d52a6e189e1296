"""Files that are made once from other files, and found again by the digest of what they were made from.

A file is believed only if its own digest and key, kept in its head, are those of its content and name: what is damaged,
half written, copied from another or of another version is made anew. Processes that want the same file at the same time
make it once. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "VERL_CACHE_DIR"
# Bytes before the content: what kind of file it is, and the content's digest. A multiple of Arrow's alignment.
HEAD = 128
KIND = "verl cache 2 "
BLOCK = 1 << 22
# Seconds after which a part is one that a killed process has left.
LEFT_BEHIND = 24 * 3600
# Seconds after which it is said that another process is waited for.
PATIENCE = 5


def file_digest(path: Path, start: int = 0) -> str:
    """SHA-256 of a file's content from byte `start` on, at about 1 GB/s."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def cache_folder(folder: str | Path | None = None) -> Path:
    """The folder, absolute; for None $VERL_CACHE_DIR, or ~/.cache/verl without it."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/verl").expanduser().absolute()


class Cache:
    """A folder of files by key.

    Args:
        folder: is made when the first file is; None: see `cache_folder`.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = cache_folder(folder)

    def file(self, key: str, write: Callable[[Path], None], what: str) -> Path | None:
        """The file of this key; its content begins at byte HEAD.

        Args:
            key: of all that the content is made from; a file name.
            write: appends the content to a file that has its head.
            what: the content, in words.

        Returns:
            None where the folder cannot be used, which is said.
        """
        try:
            # Before the lock, which nobody gets in a folder that can only be read, or is another user's.
            found = self._found(key)
            if found:
                return found
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone(key, what):
                return self._found(key) or self._made(key, write, what)
        except OSError as error:
            logger.warning(
                "%s cannot be kept in %s (%s), so the next start makes it again: free some room, or set data.cache_dir",
                what, self.folder, error,
            )  # fmt: skip
            return None

    @contextmanager
    def _alone(self, key: str, what: str) -> Iterator[None]:
        """No other process makes this file meanwhile, where the file system has locks; elsewhere both make it."""
        lock = FileLock(self.folder / f"{key}.lock", timeout=PATIENCE)
        try:
            lock.acquire()
        except Timeout:
            logger.info("waiting for another process that makes %s in %s", what, self.folder)
            lock.acquire(timeout=-1)
        except NotImplementedError:
            pass
        try:
            yield
        finally:
            lock.release()

    def _found(self, key: str) -> Path | None:
        path = self.folder / key
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(HEAD)
        return path if head == _head(key, file_digest(path, HEAD)) else None

    def _made(self, key: str, write: Callable[[Path], None], what: str) -> Path:
        if (self.folder / key).is_file():
            logger.warning("%s in %s is damaged: it is made anew", what, self.folder / key)
        for left in self.folder.glob(f"{key}.*.part"):
            with suppress(OSError):
                # A younger one may be written at this moment, where the file system has no locks.
                if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                    left.unlink()
        part = self.folder / f"{key}.{secrets.token_hex(4)}.part"
        try:
            part.write_bytes(bytes(HEAD))
            write(part)
            with part.open("r+b") as file:
                file.write(_head(key, file_digest(part, HEAD)))
            os.replace(part, self.folder / key)
        finally:
            with suppress(OSError):
                part.unlink()
        return self.folder / key


def _head(key: str, digest: str) -> bytes:
    return f"{KIND}{digest} {hashlib.sha256(key.encode()).hexdigest()[:32]}\n".encode().ljust(HEAD)
