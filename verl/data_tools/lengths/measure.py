"""Tokens of each row's prompt and answer, counted as training counts them.

Files are streamed: of a row, its two lengths are kept. R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
from tqdm import tqdm

from verl.utils.dataset.faults import (
    TemplateCheck,
    fault_of_answer,
    fault_of_columns,
    fault_of_depth,
    fault_of_messages,
)
from verl.utils.dataset.rows import Row, make_row, read_jsonl, read_parquet, refuse
from verl.utils.dataset.texts import Messages, Tokenization

# Of texts that are tokenised together: their ids take some tens of MB, and every core gets its share.
BATCH_CHARACTERS = 1_000_000
READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}
WAY_OUT = (
    "Correct the files, name other columns (--prompt_key, --teacher_key), or leave such rows out: --on_bad_row skip"
)


@dataclass(frozen=True)
class Columns:
    """The columns of prompts and answers, and what becomes of rows that cannot be used."""

    prompt: str = "content"
    answer: str = "teacher_response"
    on_bad_row: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Lengths:
    """Tokens of R rows: of prompts (R,), and of answers (R,) with their EOS.

    looked_at: rows that were read, those that were left out included. total: rows of the files, of which these may be a
    sample. left_out: how many, by fault.
    """

    prompts: np.ndarray
    answers: np.ndarray
    looked_at: int
    total: int
    left_out: Mapping[str, int]

    @property
    def whole(self) -> np.ndarray:
        """Prompt and answer together, (R,)."""
        return self.prompts + self.answers


def count_rows(paths: Sequence[Path]) -> int:
    """Rows of all files, empty lines of jsonl files among them."""
    return sum(_count(path) for path in paths)


def _count(path: Path) -> int:
    if path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file that ends in {' or '.join(READERS)}; convert it first")
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


def stream_rows(paths: Sequence[Path], chosen: np.ndarray | None = None) -> Iterator[Row]:
    """The rows of all files in order, those that cannot be read among them.

    Args:
        chosen: numbers of the rows to give, over all files, ascending; None: all.
    """
    index, wanted = 0, None if chosen is None else set(chosen.tolist())
    for path in paths:
        for number, record in enumerate(READERS[path.suffix](path)):
            if wanted is None or index in wanted:
                yield make_row(path, number, index, record)
            index += 1


def fault_of_row(row: Row, columns: Columns, template: TemplateCheck) -> str | None:
    """Why training would not use the row, or None."""
    record = row.record
    return (
        row.unreadable
        or fault_of_columns(record, (columns.prompt, columns.answer))
        or fault_of_messages(record[columns.prompt], columns.prompt)
        or fault_of_answer(record[columns.answer], columns.answer)
        or fault_of_depth(record.get("extra_info"), "'extra_info'")
        or template.fault(record[columns.prompt], record[columns.answer])
    )


class Measuring:
    """Counts tokens batch by batch, so that a file of any size takes little memory.

    Args:
        tokenization: of the model that is to be trained.
        columns: where the texts stand.
    """

    def __init__(self, tokenization: Tokenization, columns: Columns):
        self.tokenization = tokenization
        self.columns = columns
        self.template = TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)
        self.prompts: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []
        self.faults: list[tuple[Row, str]] = []
        self._rows: list[Row] = []
        self._characters = 0

    def add(self, row: Row) -> None:
        """Look at a row, and tokenise when enough of them are there."""
        fault = fault_of_row(row, self.columns, self.template)
        if fault:
            self.faults.append((row, fault))
            return
        self._rows.append(row)
        messages: Messages = row.record[self.columns.prompt]
        self._characters += sum(len(message["content"]) for message in messages)
        self._characters += len(row.record[self.columns.answer])
        if self._characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Tokenise what waits."""
        if not self._rows:
            return
        prompts = self.tokenization.prompts([row.record[self.columns.prompt] for row in self._rows])
        answers = self.tokenization.answers([row.record[self.columns.answer] for row in self._rows])
        counts = np.array([(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)])
        # An answer without a token but its EOS.
        empty = counts[:, 1] == 1
        self.faults += [
            (row, "the tokenizer makes no token of the answer: does it belong to this model and language?")
            for row, none in zip(self._rows, empty, strict=True) if none
        ]  # fmt: skip
        self.prompts.append(counts[~empty, 0])
        self.answers.append(counts[~empty, 1])
        self._rows, self._characters = [], 0

    def result(self, looked_at: int, sampled_of: int | None = None) -> Lengths:
        """All lengths so far; ValueError where rows cannot be used, unless they are to be skipped, and for no row."""
        self.flush()
        if self.columns.on_bad_row == "error":
            refuse(
                [row.unreadable or f"{row.place}: {fault}" for row, fault in self.faults],
                f"{len(self.faults)} of {looked_at} rows cannot be used",
                WAY_OUT,
            )
        if not sum(map(len, self.prompts)):
            raise ValueError(f"no row is left of {looked_at}: {faults_in_words(self._counted()) or 'there is none'}")
        counts = [np.concatenate(side) for side in (self.prompts, self.answers)]
        return Lengths(*counts, looked_at, sampled_of or looked_at, self._counted())

    def _counted(self) -> dict[str, int]:
        return dict(Counter("not readable" if row.unreadable else fault for row, fault in self.faults).most_common())


def faults_in_words(left_out: Mapping[str, int], shown: int = 5) -> str:
    """The most frequent faults with their counts."""
    said = "; ".join(f"{count} x {fault}" for fault, count in list(left_out.items())[:shown])
    return said + (f"; and {len(left_out) - shown} other reasons" if len(left_out) > shown else "")


def measure(
    paths: Sequence[Path], tokenization: Tokenization, columns: Columns, sample: int | None = None, seed: int = 0
) -> Lengths:
    """The lengths of all rows of the files, or of a random `sample` of them, with a bar where somebody watches.

    Raises:
        ValueError: a file cannot be read, a row cannot be used (unless columns.on_bad_row is "skip"), or none is left.
    """
    total = count_rows(paths)
    chosen = None
    if sample is not None and sample < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, sample, replace=False))
    measuring, looked_at = Measuring(tokenization, columns), 0
    bar: Any = tqdm(total=sample if chosen is not None else total, desc="tokens", unit="row", delay=2, disable=None)
    with bar:
        for row in stream_rows(paths, chosen):
            measuring.add(row)
            looked_at += 1
            bar.update()
    return measuring.result(looked_at, None if chosen is None else total)
