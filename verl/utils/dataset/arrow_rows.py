"""The rows of one file in Arrow: of a large file in memory-mapped form, which takes no memory and is opened at once.

A parquet file's columns stay as they are. Of a jsonl file the lines are kept, not columns: rows may have different
fields, and fields different types, and each row is to be read as it stands there.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from verl.utils.command_line import called_as
from verl.utils.dataset.cache import HEAD, Cache, file_digest
from verl.utils.lfs import LFS_POINTER

# Rows of a file in one Arrow batch; fewer where a nested column of them exceeds what Arrow can take.
ROWS_PER_BATCH = 8192
# Of lines in one batch.
BYTES_PER_BATCH = 1 << 24
# A larger file is converted once and mapped from then on; a smaller one is read into memory.
MAPPED_BYTES = 1 << 24
# Rows that are Python objects at the same time, where many are looked at.
ROWS_AT_ONCE = 1024
_LINES = pa.schema({"number": pa.int64(), "line": pa.large_binary()})


class Unreadable(NamedTuple):
    """In the place of a record: the line of the file, from 1, where it has lines, and what is wrong."""

    line: int | None
    fault: str


class NoTurn(NamedTuple):
    """In the place of a record: why a conversation has no row to train on here."""

    fault: str


Record = dict[str, Any] | Unreadable | NoTurn


class Place(NamedTuple):
    """Where a row stands in its file, counted from 0: the file's row, and which assistant turn of a conversation."""

    row: int
    turn: int | None = None

    def __str__(self) -> str:
        return f"row {self.row}" if self.turn is None else f"row {self.row}, turn {self.turn}"


def stream_records(path: Path) -> Iterator[Record]:
    """The rows of a parquet or jsonl file while it is read, for those who look at each of them once. ValueError: it
    cannot be read."""
    for batch in _READERS[path.suffix](path):
        yield from _RECORDS[path.suffix](batch)


class FileRows:
    """The rows of a parquet or jsonl file.

    Args:
        path: the file.
        cache: where a large file's rows are mapped from.

    Raises:
        ValueError: it cannot be read, changed meanwhile, is of another kind, or has no rows.
    """

    def __init__(self, path: Path, cache: Cache):
        if path.suffix not in _READERS:
            raise ValueError(
                f"{path} ends in none of {', '.join(_READERS)}: `{called_as('verl.data_tools.convert')}` makes such "
                "a file of .json, .csv and .xlsx"
            )
        self.path = path
        self.digest = file_digest(path)
        self.mapped = self._convert(cache) if path.stat().st_size > MAPPED_BYTES else None
        self._take(_map(self.mapped) if self.mapped else list(self._read()))

    def _read(self) -> Iterator[pa.RecordBatch]:
        """The batches of the file that has this digest: one, at least."""
        rows = 0
        for batch in _READERS[self.path.suffix](self.path):
            rows += len(batch)
            yield batch
        if not rows:
            raise ValueError(f"{self.path} has no rows")
        if file_digest(self.path) != self.digest:
            raise ValueError(f"{self.path} changed while it was read: start again when it is written")

    def _convert(self, cache: Cache) -> Path | None:
        def write(part: Path) -> None:
            batches = self._read()
            first = next(batches)
            with part.open("ab") as file, pa.ipc.new_stream(file, first.schema) as stream:
                stream.write_batch(first)
                for batch in batches:
                    stream.write_batch(batch)

        return cache.file(
            f"rows-{self.digest}{self.path.suffix}-{_reader()}", write, f"the memory-mapped form of {self.path}"
        )

    def _take(self, batches: list[pa.RecordBatch]) -> None:
        self._batches = batches
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> Place:
        """Where a row stands in the file."""
        return Place(number)

    def record(self, number: int) -> Record:
        """One row, read anew each time."""
        return next(self.records(number, number + 1))

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The rows from `start` to before `stop`."""
        decode = _RECORDS[self.path.suffix]
        while start < stop:
            at = int(np.searchsorted(self._ends, start, side="right"))
            batch, begin = self._batches[at], int(self._ends[at]) - len(self._batches[at])
            part = batch.slice(start - begin, min(stop - start, ROWS_AT_ONCE))
            yield from decode(part)
            start += len(part)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which maps the same file."""
        return self.__dict__ | {"_batches": None} if self.mapped else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self.mapped:
            self._take(_map(self.mapped))


@lru_cache
def _reader() -> str:
    """What makes rows of a file besides its content: this code, and pyarrow."""
    return hashlib.sha256(Path(__file__).read_bytes() + pa.__version__.encode()).hexdigest()[:16]


def _map(file: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(str(file)) as source:
        source.seek(HEAD)
        return list(pa.ipc.open_stream(source.read_buffer()))


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def _read_parquet(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from _read_row_group(file, group)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file{_looks_like(path)}: {error}") from error


def _looks_like(path: Path) -> str:
    """What a file seems to be that is not what its name says."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS_POINTER):
        return ", but a Git LFS pointer (run `git lfs pull` in its folder)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return ", but a web page (download the file itself)"
    if head.startswith(b"PAR1"):
        return ", but cut short (copy it again)"
    if head.lstrip()[:1] in (b"{", b"["):
        return ", but JSON (name it .jsonl, with an object on each line)"
    return "" if head else ", but empty"


def _read_row_group(file: pyarrow.parquet.ParquetFile, group: int) -> Iterator[pa.RecordBatch]:
    """In batches, because pyarrow cannot convert a nested column of more than 2 GiB at once. How large one is shows
    when it is decoded and not before: a batch that is too large is read again in smaller ones."""
    done, size = 0, ROWS_PER_BATCH
    while True:
        try:
            start = 0
            for batch in file.iter_batches(size, row_groups=[group]):
                new, start = batch.slice(max(0, done - start)), start + len(batch)
                if len(new):
                    yield new
                done += len(new)
            return
        except pa.ArrowNotImplementedError:
            if size == 1:
                raise
            size = max(1, size // 8)


def _parquet_records(batch: pa.RecordBatch) -> Iterator[Record]:
    try:
        yield from batch.to_pylist()
    # A date after the year 9999 is an OverflowError, a time zone or field name that Python cannot have a ValueError.
    except (ValueError, OverflowError) as error:
        # Nothing has been given yet: all of a batch is converted before its first row.
        if len(batch) == 1:
            yield Unreadable(None, _fault_of_value(error))
        else:
            for row in range(len(batch)):
                yield from _parquet_records(batch.slice(row, 1))


def _fault_of_value(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"its text is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return f"one of its columns has a value that cannot be read ({error}): mend that column or leave it out"


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _refuse_other_text(path: Path) -> None:
    """ValueError for a file that is no JSON lines in UTF-8 from its first bytes on, in which every line would fail."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{path}, line 1 (from 1) is not UTF-8 but UTF-16, as Windows writes it: save the file as UTF-8 (iconv -f "
            "UTF-16 -t UTF-8)"
        )
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")
    if head.startswith(b"PAR1"):
        raise ValueError(f"{path} is a parquet file by its content: name it .parquet")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page and not JSON lines: download the file itself")
    if re.match(rb"\s*\[\s*(\{|$)", head.removeprefix(codecs.BOM_UTF8)):
        raise ValueError(
            f"{path} is a JSON array and not JSON lines, an object on each line: "
            f"`{called_as('verl.data_tools.convert')}` makes such a file of it, if it is named .json"
        )


def _read_lines(path: Path) -> Iterator[pa.RecordBatch]:
    _refuse_other_text(path)
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    # Bytes that are not UTF-8 become halves of surrogate pairs, which UTF-8 itself cannot have, and bytes again.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            numbers.append(number)
            lines.append(line.encode(errors="surrogateescape"))
            size += len(lines[-1])
            if len(lines) >= ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
                yield pa.record_batch([numbers, lines], schema=_LINES)
                numbers, lines, size = [], [], 0
    if lines:
        yield pa.record_batch([numbers, lines], schema=_LINES)


def _line_records(batch: pa.RecordBatch) -> Iterator[Record]:
    numbers, lines = batch.columns
    for number, line in zip(numbers.to_pylist(), lines.to_pylist(), strict=True):
        yield _parse(line, number)


def _parse(line: bytes, number: int) -> Record:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return Unreadable(number, f"is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8{_maybe(line)}")
    except RecursionError:
        return Unreadable(number, "is nested too deeply to be read")
    except ValueError as error:
        return Unreadable(number, f"is not JSON: {error}")
    if not isinstance(record, dict):
        return Unreadable(number, f"is not a JSON object but {type(record).__name__}")
    return record


def _maybe(line: bytes) -> str:
    """The command for a line of the encoding that Chinese Windows writes, which it may be of."""
    try:
        text = line.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    return " (iconv -f GB18030 -t UTF-8)" if 2 * chinese > sum(not letter.isascii() for letter in text) else ""


_READERS: dict[str, Callable[[Path], Iterator[pa.RecordBatch]]] = {".parquet": _read_parquet, ".jsonl": _read_lines}
# What files of rows end in.
READABLE = tuple(_READERS)
_RECORDS: dict[str, Callable[[pa.RecordBatch], Iterator[Record]]] = {
    ".parquet": _parquet_records,
    ".jsonl": _line_records,
}
