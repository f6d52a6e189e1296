"""Rows of several parquet and jsonl files as they stand there, and what is said of those that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from verl.utils.command_line import called_as
from verl.utils.dataset.arrow_rows import ROWS_AT_ONCE, FileRows, NoTurn, Place, Record, Unreadable
from verl.utils.dataset.faults import is_of_another_format

if TYPE_CHECKING:
    from verl.utils.dataset.turns import TurnRows

logger = logging.getLogger(__name__)

SHOWN_BAD_ROWS = 10
# What is said of a row that cannot be read where equal faults are counted.
NOT_READABLE = "not readable"
# What to do about a file whose rows are of another format, all of them.
OTHER_FORMAT = (
    "Name the columns with data.prompt_key (chat messages) and data.response_key (text), or bring the file into this "
    "form with "
)


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file."""

    path: Path
    number: int  # within the file, from 0
    index: int  # over all files, from 0; the same whatever is dropped
    record: dict[str, Any]
    unreadable: str | None = None  # where and why, if there is no record
    turn: int | None = None  # of a conversation, the assistant turn, from 0

    @property
    def place(self) -> str:
        """The file and the row's number in it, for messages."""
        return f"{self.path}, {Place(self.number, self.turn)}"


def make_row(path: Path, number: int, index: int, record: Record, turn: int | None = None) -> Row:
    """A row of what a reader gave."""
    if not isinstance(record, Unreadable):
        return Row(path, number, index, {} if isinstance(record, NoTurn) else record, turn=turn)
    place = f"{path}, row {number}:" if record.line is None else f"{path}, line {record.line} (from 1)"
    return Row(path, number, index, {}, f"{place} {record.fault}")


class Rows(Sequence[Row]):
    """Rows of several files, numbered over all of them: all, or a choice. Each is read when it is asked for.

    Args:
        files: in order.
        chosen: the rows' numbers over all files, (R,); None: all.
    """

    def __init__(self, files: Sequence[FileRows | TurnRows], chosen: np.ndarray | None = None):
        self.files = list(files)
        self._ends = np.cumsum([len(file) for file in self.files], dtype=np.int64)
        self.chosen = np.arange(self._ends[-1]) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, item: int) -> Row: ...

    @overload
    def __getitem__(self, item: slice | np.ndarray) -> Rows: ...

    def __getitem__(self, item: int | slice | np.ndarray) -> Row | Rows:
        """A row, or the rows of a slice, of positions or of a mask (R,)."""
        if isinstance(item, slice | np.ndarray):
            return Rows(self.files, self.chosen[item])
        index = int(self.chosen[item])
        file, first = self._file(index)
        return _row(file, index - first, index, file.record(index - first))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            part = self.chosen[start : start + ROWS_AT_ONCE]
            file, first = self._file(int(part[0]))
            begin, end = int(part[0]) - first, int(part[0]) - first + len(part)
            if end > len(file) or (np.diff(part) != 1).any():
                yield from (self[number] for number in range(start, start + len(part)))
                continue
            for number, record in enumerate(file.records(begin, end), start=begin):
                yield _row(file, number, first + number, record)

    def _file(self, index: int) -> tuple[FileRows | TurnRows, int]:
        """The file of a row, and the number of the file's first row."""
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[at], int(self._ends[at]) - len(self.files[at])

    def by_file(self) -> Counter[Path]:
        """How many of the rows each file has; files without any count 0."""
        result: Counter[Path] = Counter()
        for file, count in zip(self.files, self.counts(), strict=True):
            result[file.path] += count
        return result

    def counts(self) -> list[int]:
        """How many of the rows are of each of `files`."""
        of_files = np.searchsorted(self._ends, self.chosen, side="right")
        return np.bincount(of_files, minlength=len(self.files)).tolist()


def _row(file: FileRows | TurnRows, number: int, index: int, record: Record) -> Row:
    place = file.place(number)
    return make_row(file.path, place.row, index, record, place.turn)


def refuse(faults: Sequence[str], head: str, way_out: str, count: int | None = None) -> None:
    """ValueError with the first of the faults, if there is one; each names the row that it is of. `count`: how many
    there are, if these are the first of them."""
    if faults:
        count = count or len(faults)
        more = [f"  ... and {count - SHOWN_BAD_ROWS} more"] if count > SHOWN_BAD_ROWS else []
        shown = [f"  {fault}" for fault in faults[:SHOWN_BAD_ROWS]]
        raise ValueError("\n".join([f"{head} (rows of a file are counted from 0):", *shown, *more, way_out]))


def without_faults(rows: Rows, faults: Sequence[str | None], on_bad_row: Literal["error", "skip"]) -> np.ndarray:
    """The mask (R,) of rows without a fault; ValueError lists those with one, unless they are to be skipped, with a
    count. A row that cannot be read says itself why."""
    bad = [number for number, fault in enumerate(faults) if fault is not None]
    if bad and on_bad_row == "error":
        first = [(rows[number], faults[number]) for number in bad[:SHOWN_BAD_ROWS]]
        row, fault = first[0]
        if len(bad) == len(rows) > 1 and len(set(faults)) == 1 and is_of_another_format(fault):
            instead = OTHER_FORMAT + called_as("verl.data_tools.convert")
            raise ValueError(f"{row.place}: {fault}, and so it is with all {len(bad)} rows. {instead}")
        refuse(
            [row.unreadable or f"{row.place}: {fault}" for row, fault in first],
            f"{len(bad)} of {len(rows)} rows cannot be used",
            "Correct the files, data.prompt_key or data.response_key, or leave such rows out: data.on_bad_row=skip",
            len(bad),
        )
    if bad:
        counts = Counter(faults[number] for number in bad).most_common()
        reasons = "; ".join(f"{count} x {fault}" for fault, count in counts[:SHOWN_BAD_ROWS])
        more = f"; and {len(counts) - SHOWN_BAD_ROWS} other reasons" if len(counts) > SHOWN_BAD_ROWS else ""
        first = rows[bad[0]].unreadable or rows[bad[0]].place
        logger.warning(
            "data.on_bad_row=skip: left out %d of %d rows: %s%s; the first is %s",
            len(bad), len(rows), reasons, more, first,
        )  # fmt: skip
    sound = np.ones(len(rows), dtype=bool)
    sound[bad] = False
    return sound
