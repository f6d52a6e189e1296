"""Rows of parquet and jsonl files as they stand there, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet

logger = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 10
# Rows of a parquet file that are read at once; fewer where a nested column of them exceeds what Arrow can take.
ROWS_PER_BATCH = 8192


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file."""

    path: Path
    number: int  # within the file, from 0
    index: int  # over all files, from 0; the same whatever is dropped
    record: dict[str, Any]
    unreadable: str | None = None  # where and why, if there is no record

    @property
    def place(self) -> str:
        """The file and the row's number in it, for messages."""
        return f"{self.path}, row {self.number}"


class Unreadable(NamedTuple):
    """In the place of a record: the line of the file, from 1, where it has lines, and what is wrong."""

    line: int | None
    fault: str


def make_row(path: Path, number: int, index: int, record: dict[str, Any] | Unreadable) -> Row:
    """A row of what a reader gave."""
    if isinstance(record, dict):
        return Row(path, number, index, record)
    place = f"{path}, row {number}:" if record.line is None else f"{path}, line {record.line} (from 1)"
    return Row(path, number, index, {}, f"{place} {record.fault}")


def read_parquet(path: Path) -> Iterator[dict[str, Any] | Unreadable]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from _read_row_group(file, group)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _read_row_group(file: pyarrow.parquet.ParquetFile, group: int) -> Iterator[dict[str, Any] | Unreadable]:
    """In batches, because pyarrow cannot convert a nested column of more than 2 GiB at once. How large one is shows
    when it is decoded and not before: a batch that is too large is read again in smaller ones."""
    done, size = 0, ROWS_PER_BATCH
    while True:
        try:
            start = 0
            for batch in file.iter_batches(size, row_groups=[group]):
                new, start = batch.slice(max(0, done - start)), start + len(batch)
                yield from _records(new)
                done += len(new)
            return
        except pyarrow.ArrowNotImplementedError:
            if size == 1:
                raise
            size = max(1, size // 8)


def _records(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | Unreadable]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        # Nothing has been given yet: all of a batch is converted before its first row.
        if len(batch) == 1:
            yield Unreadable(None, f"its text is not UTF-8 (byte 0x{error.object[error.start]:02x})")
        else:
            for row in range(len(batch)):
                yield from _records(batch.slice(row, 1))


def read_jsonl(path: Path) -> Iterator[dict[str, Any] | Unreadable]:
    # Bytes that are not UTF-8 become halves of surrogate pairs, which UTF-8 itself cannot have.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, number)


def _parse(line: str, number: int) -> dict[str, Any] | Unreadable:
    try:
        line.encode()
        record = json.loads(line)
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        return Unreadable(number, f"is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8")
    except RecursionError:
        return Unreadable(number, "is nested too deeply to be read")
    except ValueError as error:
        return Unreadable(number, f"is not JSON: {error}")
    if not isinstance(record, dict):
        return Unreadable(number, f"is not a JSON object but {type(record).__name__}")
    return record


def refuse(faults: Sequence[str], head: str, way_out: str) -> None:
    """ValueError with the first of the faults, if there is one; each names the row that it is of."""
    if faults:
        more = [f"  ... and {len(faults) - SHOWN_BAD_ROWS} more"] if len(faults) > SHOWN_BAD_ROWS else []
        shown = [f"  {fault}" for fault in faults[:SHOWN_BAD_ROWS]]
        raise ValueError("\n".join([f"{head} (rows of a file are counted from 0):", *shown, *more, way_out]))


def without_faults(rows: list[Row], faults: Sequence[str | None], on_bad_row: Literal["error", "skip"]) -> list[Row]:
    """The rows without a fault; ValueError lists those with one, unless they are to be skipped, with a count."""
    bad = [(row, fault) for row, fault in zip(rows, faults, strict=True) if fault]
    if not bad:
        return rows
    if on_bad_row == "error":
        refuse(
            [row.unreadable or f"{row.place}: {fault}" for row, fault in bad],
            f"{len(bad)} of {len(rows)} rows cannot be used",
            "Correct the files, data.prompt_key or data.response_key, or leave such rows out: data.on_bad_row=skip",
        )
    counts = Counter("not readable" if row.unreadable else fault for row, fault in bad).most_common()
    reasons = "; ".join(f"{count} x {fault}" for fault, count in counts[:SHOWN_BAD_ROWS])
    more = f"; and {len(counts) - SHOWN_BAD_ROWS} other reasons" if len(counts) > SHOWN_BAD_ROWS else ""
    first = bad[0][0].unreadable or bad[0][0].place
    logger.warning(
        "data.on_bad_row=skip: left out %d of %d rows: %s%s; the first is %s", len(bad), len(rows), reasons, more, first
    )
    return [row for row, fault in zip(rows, faults, strict=True) if not fault]
