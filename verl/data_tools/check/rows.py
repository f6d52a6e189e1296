"""Rows as training reads them, and why it refuses some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.data_tools.check.findings import Finding, Sample
from verl.data_tools.rows import Columns, fault_of_read, stream_rows
from verl.utils.dataset.faults import TemplateCheck
from verl.utils.dataset.rl_dataset import find_files
from verl.utils.dataset.rows import Row


def read(files: Sequence[str | Path]) -> list[Row]:
    """All rows of the files, those that cannot be read too; FileNotFoundError or ValueError for a damaged file."""
    return list(stream_rows(find_files(list(files))))


def look_at(
    rows: Sequence[Row], prompt_key: str, teacher_key: str, template: TemplateCheck | None
) -> tuple[list[Sample | None], list[Finding]]:
    """A sample of each row, None where training refuses it, and why.

    Args:
        template: the model's; without one, its faults are not found.
    """
    columns = Columns(prompt_key, teacher_key)
    samples: list[Sample | None] = []
    found: list[Finding] = []
    for number, row in enumerate(progress(rows, "looking at rows")):
        empty = None if row.unreadable else _empty(row.record, prompt_key, teacher_key)
        fault = fault_of_read(row, columns, template)
        if empty:
            found.append(Finding("empty", number, empty))
        elif row.unreadable:
            found.append(Finding("bad", number, "it cannot be read", row.unreadable))
        elif fault:
            found.append(Finding("bad", number, fault))
        samples.append(None if fault else Sample(row, row.record[prompt_key], row.record[teacher_key]))
    return samples, found


def progress(items: Sequence[Any], what: str) -> tqdm:
    """A bar for what takes a while."""
    return tqdm(items, desc=what, unit="row", leave=False, dynamic_ncols=True, delay=2, disable=None)


def _empty(record: Mapping[str, Any], prompt_key: str, teacher_key: str) -> str | None:
    """That a prompt's last message or an answer has no text, which training refuses only of answers, or None."""
    answer, messages = record.get(teacher_key), record.get(prompt_key)
    if teacher_key in record and (answer is None or (isinstance(answer, str) and not answer.strip())):
        return "the answer is empty" if answer is not None else "the answer is null"
    last = messages[-1] if isinstance(messages, list) and messages else None
    text = last.get("content") if isinstance(last, dict) else None
    return "the prompt's last message is empty" if isinstance(text, str) and not text.strip() else None
