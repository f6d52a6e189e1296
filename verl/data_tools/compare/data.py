"""The two sets: their rows, checked, and at most so many of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from verl.data_tools.rows import Columns, count_rows, stream_rows
from verl.tools.prompts import as_messages
from verl.utils.dataset.faults import (
    TemplateCheck,
    fault_of_answer,
    fault_of_columns,
    fault_of_conversation,
    fault_of_messages,
)
from verl.utils.dataset.rl_dataset import find_files
from verl.utils.dataset.rows import Row, refuse
from verl.utils.dataset.texts import Messages, conversation
from verl.utils.rouge import tokenize

# Fewer different prompts tell nothing.
FEWEST = 20


class Counts(NamedTuple):
    """Rows of the files, rows that were read of them, and rows of these that cannot be used."""

    total: int
    read: int
    left_out: int


@dataclass(frozen=True)
class Side:
    """One set: R rows, the first of each different prompt, since every test takes rows as independent.

    prompts: the messages' texts, one after the other, (R,). answers: (R,). students: a student's, (R,), or None.
    keys: of a prompt, equal where two differ in case, spaces and signs alone, (R,). every_key: digests of those
    of all rows of the files.
    """

    name: str
    messages: list[Messages]
    prompts: list[str]
    answers: list[str]
    students: list[str] | None
    keys: list[str]
    every_key: Set[bytes]
    counts: Counts

    def __len__(self) -> int:
        return len(self.prompts)

    def knows(self, key: str) -> bool:
        """Whether a prompt with this key is in the files, whatever was drawn of them."""
        return digest(key) in self.every_key


def read_side(
    name: str,
    files: Sequence[str],
    columns: Columns,
    student_key: str | None,
    max_rows: int,
    seed: int,
    templates: Sequence[TemplateCheck] = (),
) -> Side:
    """Rows of the files, or `max_rows` of them that the seed draws.

    Args:
        templates: of the models that are to read the rows.

    Raises:
        FileNotFoundError, ValueError: a file, a column or a row cannot be used, or there are too few; says what to do.
    """
    paths = find_files(list(files))
    total, rows, every_key = count_rows(paths), [], set()
    wanted = None
    if max_rows < total:
        wanted = set(np.random.default_rng(seed).choice(total, max_rows, replace=False).tolist())
    for row in stream_rows(paths):
        if wanted is None or row.index in wanted:
            rows.append(row)
        messages = as_messages(row.record.get(columns.prompt))
        if fault_of_messages(messages, columns.prompt) is None:
            every_key.add(digest(key_of(_text(messages))))
    faults = [row.unreadable or _fault(row, columns, student_key, templates) for row in rows]
    if columns.on_bad_row == "error":
        refuse(
            [row.unreadable or f"{row.place}: {fault}" for row, fault in zip(rows, faults, strict=True) if fault],
            f"{sum(fault is not None for fault in faults)} of {len(rows)} rows cannot be used",
            "Correct the files, name other columns (--prompt_key, --teacher_key, --student_key), or leave such rows "
            "out: --on_bad_row skip",
        )
    good = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    first = {key_of(_text(as_messages(row.record[columns.prompt]))): row for row in reversed(good)}
    chosen = sorted(first.values(), key=lambda row: row.index)
    counts = Counts(total, len(rows), len(rows) - len(good))
    side = _side(name, chosen, columns, student_key, every_key, counts)
    if len(side) < FEWEST:
        raise ValueError(
            f"{', '.join(map(str, paths))}: expected at least {FEWEST} different prompts, without which every two sets "
            f"look alike, got {len(side)} in {len(rows)} rows; pass more rows"
        )
    return side


def _fault(row: Row, columns: Columns, student_key: str | None, templates: Sequence[TemplateCheck]) -> str | None:
    keys = [columns.prompt, columns.answer, *([student_key] if student_key else [])]
    fault = fault_of_columns(row.record, keys)
    if fault:
        return fault
    answers: list[Any] = [row.record[key] for key in keys[1:]]
    faults = (fault_of_answer(answer, key) for answer, key in zip(answers, keys[1:], strict=True))
    messages = as_messages(row.record[columns.prompt])
    fault = fault_of_conversation(messages, row.record, columns.prompt) or next(filter(None, faults), None)
    if fault:
        return fault
    messages = conversation(messages, row.record)
    return next(filter(None, (template.fault(messages) for template in templates)), None)


def _side(
    name: str,
    rows: Sequence[Row],
    columns: Columns,
    student_key: str | None,
    every_key: Set[bytes],
    counts: Counts,
) -> Side:
    messages = [as_messages(row.record[columns.prompt]) for row in rows]
    prompts = [_text(each) for each in messages]
    return Side(
        name=name,
        messages=[conversation(each, row.record) for each, row in zip(messages, rows, strict=True)],
        prompts=prompts,
        answers=[row.record[columns.answer] for row in rows],
        students=[row.record[student_key] for row in rows] if student_key else None,
        keys=[key_of(prompt) for prompt in prompts],
        every_key=every_key,
        counts=counts,
    )


def _text(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages)


def key_of(prompt: str) -> str:
    """Its words, or, where it has signs alone, these."""
    return " ".join(tokenize(prompt)) or prompt.strip()


def digest(key: str) -> bytes:
    """Eight bytes for a key of any length."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def name_of(files: Sequence[str]) -> str:
    """What a set is called: its file, and that there are more."""
    first = Path(files[0]).stem
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"
