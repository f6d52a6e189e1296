"""Rows as training reads them, and why it refuses some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet

from verl.data_tools.reading import TRAINED
from verl.utils.dataset.arrow_rows import stream_records
from verl.utils.dataset.faults import TemplateCheck, fault_of_row
from verl.utils.dataset.rows import Row, make_row
from verl.utils.dataset.texts import Messages, conversation


@dataclass(frozen=True)
class Columns:
    """The columns of prompts and answers, and what becomes of rows that cannot be used."""

    prompt: str = "content"
    answer: str = "teacher_response"
    on_bad_row: Literal["error", "skip"] = "error"


def count_rows(paths: Sequence[Path]) -> int:
    """Rows of all files, empty lines of jsonl files among them."""
    return sum(_count(path) for path in paths)


def _count(path: Path) -> int:
    _check_ending(path)
    if path.suffix == ".parquet":
        try:
            return pyarrow.parquet.ParquetFile(path).metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            lines, last = lines + part.count(b"\n"), part[-1:]
    return lines + (last != b"\n")


def _check_ending(path: Path) -> None:
    if path.suffix not in TRAINED:
        raise ValueError(f"{path}: expected a file that ends in {' or '.join(TRAINED)}; convert it first")


def stream_rows(paths: Sequence[Path], chosen: np.ndarray | None = None) -> Iterator[Row]:
    """The rows of all files in order, those that cannot be read among them.

    Args:
        chosen: numbers of the rows to give, over all files, ascending; None: all.

    Raises:
        ValueError: a file cannot be read, or has no rows.
    """
    index, wanted = 0, None if chosen is None else set(chosen.tolist())
    for path in paths:
        _check_ending(path)
        first = index
        for number, record in enumerate(stream_records(path)):
            if wanted is None or index in wanted:
                yield make_row(path, number, index, record)
            index += 1
        if index == first:
            raise ValueError(f"{path} has no rows")


def fault_of_read(row: Row, columns: Columns, template: TemplateCheck | None) -> str | None:
    """Why training would not use the row, or None.

    Args:
        template: the model's; without one, its faults are not found.
    """
    return row.unreadable or fault_of_row(row.record, columns.prompt, columns.answer, template)


def conversation_of(row: Row, columns: Columns) -> Messages:
    """The messages of a row without a fault, as training gives them to the template."""
    return conversation(row.record[columns.prompt], row.record)
