"""Every answer on disk as soon as it is there: a file of lines to which only is appended, and which is all the state.

Its first line has the settings that answers depend on; each further one is an answer, or a request that was refused for
good, by a key made of prompt, settings and number. A line counts once its end is there: what a killed run left behind
the last one goes. Beside it lies `room`, as large as the answers under way may be, which makes place for them when the
disk is full.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from verl.data_tools.writing import as_line
from verl.utils.checkpoint.checksums import sync_to_disk
from verl.utils.checkpoint.room import FULL

LOG, ROOM, LOCK = "log.jsonl", "room", "lock"
FORMAT = 1
ROOM_PER_ANSWER = 1 << 18  # bytes


def key_of(body: Mapping[str, Any], number: int) -> str:
    """What an answer is known by: a digest of the whole request and of which of its answers it is."""
    return hashlib.sha256(json.dumps([body, number], sort_keys=True).encode()).hexdigest()


class AnswerLog:
    """A folder's log, held by this process.

    Args:
        folder: made if it is not there.
        settings: what all its answers depend on, besides the prompts; JSON values.

    Raises:
        ValueError: the log is of other settings; names them.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path, self._room = folder / LOG, folder / ROOM
        self.full = False  # the disk is; what has been appended is there all the same
        self.damaged = 0  # lines passed over
        self._places: dict[str, int] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._end = self._read(settings)
        os.ftruncate(self._file, self._end)
        if not self._end:
            self._write(as_line({"format": FORMAT, "settings": dict(settings)}).encode())
        sync_to_disk(folder)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def make_room(self, under_way: int) -> None:
        """Keep room for so many answers between being asked for and being appended.

        Raises:
            OSError: there is none.
        """
        size = under_way * ROOM_PER_ANSWER
        with self._room.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in FULL:
                    return  # A file system that cannot; the answers under way are then lost on a full disk.
                self._room.unlink()
                raise OSError(
                    f"{self.path.parent}: expected room for the answers under way, {size / 2**20:g} MiB, got a full "
                    "disk; make room, lower --concurrency, or put --out elsewhere; nothing was asked"
                ) from None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records with their `key`; on disk when this returns. Sets `full` where that took the last room.

        Raises:
            OSError: they are not kept; the log is as it was before.
        """
        lines = [as_line(record).encode() for record in records]
        place = self._end
        self._write(b"".join(lines))
        for record, line in zip(records, lines, strict=True):
            self._places[record["key"]] = place
            place += len(line)

    def records(self) -> Iterator[dict[str, Any]]:
        """All, in the order in which they came."""
        return self.get(self._places)

    def get(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Those of the keys that there are, in this order."""
        with self.path.open("rb") as file:
            for key in keys:
                if key in self._places:
                    file.seek(self._places[key])
                    yield json.loads(file.readline())

    def forget(self, keys: Sequence[str]) -> None:
        """Ask for these again: their next lines count."""
        for key in keys:
            del self._places[key]

    def close(self) -> None:
        os.close(self._file)
        with suppress(OSError):
            self._room.unlink()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Take in what is there; returns where its last whole line ends, 0 where there is no answer."""
        end, head = 0, None
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                record = _parse(line)
                if end == 0:
                    head = record or {}
                elif record is None:
                    self.damaged += 1
                elif "key" in record:  # Not so the first line of another log, behind which it was appended.
                    self._places[record["key"]] = end
                end += len(line)
        return end if head is not None and self._same_settings(head, settings) else 0

    def _same_settings(self, head: dict[str, Any], settings: Mapping[str, Any]) -> bool:
        """False for others of which there is no answer yet; ValueError where there is."""
        was = head.get("settings")
        if not isinstance(was, dict):
            raise ValueError(f"{self.path}: expected a log of collect, got another file; name another --out")
        now = json.loads(json.dumps(settings))
        other = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if other and self._places:
            differ = "; ".join(f"{name} was {_shown(was.get(name))}, is {_shown(now.get(name))}" for name in other)
            raise ValueError(
                f"{self.path}: expected answers with the settings of this command, got others: {differ}; name another "
                "--out, or pass the former settings to go on"
            )
        return not other

    def _write(self, data: bytes) -> None:
        try:
            self._write_once(data)
        except OSError as error:
            if error.errno not in FULL or self.full:
                raise
            self.full = True
            self._room.unlink(missing_ok=True)
            self._write_once(data)

    def _write_once(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
            sync_to_disk(self.path)
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for what is no record, as a loss of power may leave it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and ("key" in record or "settings" in record) else None


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."


@contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made; the system gives it back however the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder}: expected no other collect at work there, got one that holds {LOCK}; wait for it, or name "
            "another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()
