"""The two sets: their rows, checked, and at most so many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl.data_tools.lengths.measure import Columns, count_rows, stream_rows
from verl.tools.prompts import as_messages
from verl.utils.dataset.faults import fault_of_answer, fault_of_columns, fault_of_messages
from verl.utils.dataset.rl_dataset import find_files
from verl.utils.dataset.rows import Row, refuse
from verl.utils.dataset.texts import Messages
from verl.utils.rouge import tokenize

# Fewer different prompts tell nothing.
FEWEST = 20


@dataclass(frozen=True)
class Side:
    """One set. R rows of `total` in the files.

    prompts: the messages' texts, one after the other, (R,). answers: (R,). students: a student's, (R,), or None.
    keys: of a prompt, equal where two differ in case, spaces and signs alone, (R,).
    """

    name: str
    messages: list[Messages]
    prompts: list[str]
    answers: list[str]
    students: list[str] | None
    keys: list[str]
    total: int
    left_out: int

    def __len__(self) -> int:
        return len(self.prompts)

    def distinct(self) -> list[int]:
        """The first row of each different prompt."""
        return list({key: at for at, key in reversed(list(enumerate(self.keys)))}.values())[::-1]


def read_side(
    name: str, files: Sequence[str], columns: Columns, student_key: str | None, max_rows: int, seed: int
) -> Side:
    """Rows of the files, or `max_rows` of them that the seed draws.

    Raises:
        FileNotFoundError, ValueError: a file, a column or a row cannot be used, or there are too few; says what to do.
    """
    paths = find_files(list(files))
    total = count_rows(paths)
    chosen = None
    if max_rows < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, max_rows, replace=False))
    rows = list(stream_rows(paths, chosen))
    faults = [row.unreadable or _fault(row, columns, student_key) for row in rows]
    if columns.on_bad_row == "error":
        refuse(
            [row.unreadable or f"{row.place}: {fault}" for row, fault in zip(rows, faults, strict=True) if fault],
            f"{sum(fault is not None for fault in faults)} of {len(rows)} rows cannot be used",
            "Correct the files, name other columns (--prompt_key, --teacher_key, --student_key), or leave such rows "
            "out: --on_bad_row skip",
        )
    good = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    side = _side(name, good, columns, student_key, total, len(rows) - len(good))
    if len(side.distinct()) < FEWEST:
        raise ValueError(
            f"{', '.join(map(str, paths))}: expected at least {FEWEST} different prompts, without which every two sets "
            f"look alike, got {len(side.distinct())} in {len(rows)} rows; pass more rows"
        )
    return side


def _fault(row: Row, columns: Columns, student_key: str | None) -> str | None:
    keys = [columns.prompt, columns.answer, *([student_key] if student_key else [])]
    fault = fault_of_columns(row.record, keys)
    if fault:
        return fault
    answers: list[Any] = [row.record[key] for key in keys[1:]]
    faults = (fault_of_answer(answer, key) for answer, key in zip(answers, keys[1:], strict=True))
    return fault_of_messages(as_messages(row.record[columns.prompt]), columns.prompt) or next(
        filter(None, faults), None
    )


def _side(name: str, rows: Sequence[Row], columns: Columns, student_key: str | None, total: int, left_out: int) -> Side:
    messages = [as_messages(row.record[columns.prompt]) for row in rows]
    prompts = ["\n".join(message["content"] for message in each) for each in messages]
    return Side(
        name=name,
        messages=messages,
        prompts=prompts,
        answers=[row.record[columns.answer] for row in rows],
        students=[row.record[student_key] for row in rows] if student_key else None,
        # A prompt of signs alone has no words.
        keys=[" ".join(tokenize(prompt)) or prompt.strip() for prompt in prompts],
        total=total,
        left_out=left_out,
    )


def name_of(files: Sequence[str]) -> str:
    """What a set is called: its file, and that there are more."""
    first = Path(files[0]).stem
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"
