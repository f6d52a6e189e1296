"""Tokens of each row's prompt and answer, counted as training counts them.

Files are streamed, and many rows are counted by several processes: of a row, its two lengths are kept. R rows.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from verl.data_tools.rows import Columns, conversation_of, count_rows, fault_of_read, stream_rows
from verl.utils.dataset.faults import TemplateCheck
from verl.utils.dataset.rows import Row, refuse
from verl.utils.dataset.texts import Tokenization

# Of texts that are tokenised together: their ids take some tens of MB.
BATCH_CHARACTERS = 1_000_000
# Rows that a process is handed at once, and rows in the time of which one starts.
BATCH_ROWS, ROWS_PER_PROCESS = 500, 20_000
WAY_OUT = (
    "Correct the files, name other columns (--prompt_key, --teacher_key), or leave such rows out: --on_bad_row skip"
)


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


class Part(NamedTuple):
    """Of some rows: tokens of prompt and answer (K, 2) of those that can be used, and the others with their faults."""

    counts: np.ndarray
    faults: list[tuple[Row, str]]
    rows: int


def look_at(rows: Sequence[Row], tokenization: Tokenization, columns: Columns, template: TemplateCheck) -> Part:
    """Check rows, and tokenise those that can be used."""
    faults: list[tuple[Row, str]] = []
    good: list[Row] = []
    for row in rows:
        fault = fault_of_read(row, columns, template)
        if fault:
            faults.append((row, fault))
        else:
            good.append(row)
    counts = [_count_tokens(part, tokenization, columns) for part in _slices(good, columns)]
    both = np.concatenate(counts) if counts else np.zeros((0, 2), dtype=np.int64)
    # An answer without a token but its EOS.
    empty = both[:, 1] == 1
    faults += [
        (good[at], "the tokenizer makes no token of the answer: does it belong to this model and language?")
        for at in np.flatnonzero(empty)
    ]
    return Part(both[~empty], faults, len(rows))


def _slices(rows: Sequence[Row], columns: Columns) -> Iterator[list[Row]]:
    """The rows in parts of about BATCH_CHARACTERS."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += sum(len(message["content"]) for message in row.record[columns.prompt])
        size += len(row.record[columns.answer])
        if size >= BATCH_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _count_tokens(rows: Sequence[Row], tokenization: Tokenization, columns: Columns) -> np.ndarray:
    prompts = tokenization.prompts([conversation_of(row, columns) for row in rows])
    answers = tokenization.answers([row.record[columns.answer] for row in rows])
    return np.array([(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Many rows

# Of a process that counts: how.
_counting: list[tuple[Tokenization, Columns, TemplateCheck]] = []


def _start(tokenization: Tokenization, columns: Columns) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _counting[:] = [(tokenization, columns, TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs))]


def _look_at(rows: Sequence[Row]) -> Part:
    ((tokenization, columns, template),) = _counting
    return look_at(rows, tokenization, columns, template)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def parts_of(rows: Iterator[Row], tokenization: Tokenization, columns: Columns, workers: int) -> Iterator[Part]:
    """The rows' parts in order, made by so many processes; no more of the file is in memory than they need."""
    if workers <= 1:
        template = TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)
        for batch in _batches(rows):
            yield look_at(batch, tokenization, columns, template)
        return
    # Not forked: this process has threads (torch, tokenizers), and a fork may inherit a held lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenization, columns)) as pool:
        waiting: deque[Future[Part]] = deque()
        for batch in _batches(rows):
            waiting.append(pool.submit(_look_at, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def workers_for(rows: int) -> int:
    """As many processes as there are cores, as far as there is enough work for each to pay for its start."""
    return max(1, min(os.cpu_count() or 1, rows // ROWS_PER_PROCESS))


def faults_in_words(left_out: Mapping[str, int], shown: int = 5) -> str:
    """The most frequent faults with their counts."""
    said = "; ".join(f"{count} x {fault}" for fault, count in list(left_out.items())[:shown])
    return said + (f"; and {len(left_out) - shown} other reasons" if len(left_out) > shown else "")


def measure(
    paths: Sequence[Path],
    tokenization: Tokenization,
    columns: Columns,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Lengths:
    """The lengths of all rows of the files, or of a random `sample` of them, with a bar where somebody watches.

    Args:
        workers: processes; None: as many as pay.

    Raises:
        ValueError: a file cannot be read, a row cannot be used (unless columns.on_bad_row is "skip"), or none is left.
    """
    total, chosen = count_rows(paths), None
    if sample is not None and sample < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, sample, replace=False))
    wanted = total if chosen is None else len(chosen)
    found: list[Part] = []
    bar: Any = tqdm(total=wanted, desc="tokens", unit="row", delay=2, disable=None)
    with bar:
        rows = stream_rows(paths, chosen)
        for part in parts_of(rows, tokenization, columns, workers or workers_for(wanted)):
            found.append(part)
            bar.update(part.rows)
    return _together(found, columns, None if chosen is None else total)


def _together(found: Sequence[Part], columns: Columns, sampled_of: int | None) -> Lengths:
    looked_at = sum(part.rows for part in found)
    faults = [fault for part in found for fault in part.faults]
    if columns.on_bad_row == "error":
        refuse(
            [row.unreadable or f"{row.place}: {fault}" for row, fault in faults],
            f"{len(faults)} of {looked_at} rows cannot be used",
            WAY_OUT,
        )
    left_out = dict(Counter("not readable" if row.unreadable else fault for row, fault in faults).most_common())
    if looked_at == len(faults):
        raise ValueError(f"no row is left of {looked_at}: {faults_in_words(left_out) or 'there is none'}")
    prompts, answers = np.concatenate([part.counts for part in found]).T
    return Lengths(prompts, answers, looked_at, sampled_of or looked_at, left_out)
