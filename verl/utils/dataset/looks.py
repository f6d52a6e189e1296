"""What a start has to know of every row: its faults, its tokens, the names of special tokens in its texts.

All of it follows from the row, the tokenizer and a few settings (`Looker`), so it is looked at once and kept in the
cache, by the digests of all three and of this code. A first start takes its time, with a bar; later ones read numbers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset import arrow_rows, faults, texts, turns
from verl.utils.dataset.arrow_rows import ROWS_AT_ONCE, FileRows, Unreadable
from verl.utils.dataset.cache import HEAD, Cache
from verl.utils.dataset.faults import TemplateCheck, fault_of_row
from verl.utils.dataset.rows import NOT_READABLE, Rows
from verl.utils.dataset.texts import (
    Messages,
    Tokenization,
    conversation,
    conversation_texts,
    special_names,
    without_eos_text,
)
from verl.utils.dataset.tokenizer_checks import tells_the_time
from verl.utils.dataset.turns import TurnRows
from verl.utils.stalls import doing

# A process first imports torch and transformers, and in that time one process looks at about this many rows.
MIN_ROWS_PER_PROCESS = 5000
# Texts are tokenised for their lengths in slices of so many characters, of which the ids take some hundred MB.
SLICE_CHARACTERS = 1_000_000
# Looking at fewer rows takes no longer than a second or two.
CACHED_ROWS = 1000
# On what, besides the row, the tokenizer and the settings, it depends what is seen.
PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")
SOURCES = (arrow_rows.__file__, faults.__file__, texts.__file__, turns.__file__, __file__)


@dataclass(frozen=True)
class Looks:
    """What was seen of R rows.

    faults: sentences, (R,); None of a row that can be used. The rest is 0 or False of a row that cannot.
    prompt_tokens: (R,), int32; 0 if they were not counted.
    answer_tokens: (R,), int32, EOS included.
    special: (R,), bool, the texts have names of special tokens.
    stubborn: (R,), bool, and the tokenizer cannot read these as text.
    open_thoughts: (R,), bool, the template opens a thought that the answer never closes.
    ignored_tools: (R,), bool, there are tools, and the template does nothing with them.
    """

    faults: np.ndarray
    prompt_tokens: np.ndarray
    answer_tokens: np.ndarray
    special: np.ndarray
    stubborn: np.ndarray
    open_thoughts: np.ndarray
    ignored_tools: np.ndarray

    @classmethod
    def empty(cls, rows: int) -> Looks:
        counts = (np.zeros(rows, dtype=np.int32) for _ in range(2))
        return cls(np.full(rows, None, dtype=object), *counts, *(np.zeros(rows, dtype=bool) for _ in range(4)))

    @classmethod
    def concatenate(cls, parts: Sequence[Looks]) -> Looks:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def __getitem__(self, mask: np.ndarray) -> Looks:
        return Looks(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def write(self, file: Path) -> None:
        """Append it to a file."""
        table = pa.table(
            {name: pa.array(getattr(self, name)) for name in self.__dataclass_fields__ if name != "faults"}
        )
        columns = {name: pa.array(getattr(self, name)) for name in self.__dataclass_fields__ if name != "faults"}
        table = pa.table({"faults": pa.array(self.faults, type=pa.string()), **columns})
        with file.open("ab") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def read(cls, file: Path) -> Looks:
        """What was written behind the head of a file of the cache."""
        with file.open("rb") as stream:
            stream.seek(HEAD)
            table = pa.ipc.open_stream(stream).read_all()
        return cls(*(table[name].to_numpy() for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Looker:
    """How rows are looked at.

    tokenization: how their texts are read.
    prompt_key, response_key: the columns of chat messages and of the answer.
    counts_prompts: whether the length of prompts matters.
    """

    tokenization: Tokenization
    prompt_key: str
    response_key: str
    counts_prompts: bool

    @cached_property
    def template(self) -> TemplateCheck:
        """The model's chat template, which remembers roles that it has been tried on."""
        return TemplateCheck(self.tokenization.tokenizer, self.tokenization.template_kwargs)

    def look(self, file: FileRows | TurnRows, start: int, stop: int) -> Looks:
        """Look at the rows of a file from `start` to before `stop`."""
        seen = Looks.empty(stop - start)
        sound: list[tuple[int, Messages, str]] = []
        prompts: list[str] = []
        for number, record in enumerate(file.records(start, stop)):
            with doing(f"looking at {file.path}, {file.place(start + number)}"):
                if not isinstance(record, dict):
                    seen.faults[number] = NOT_READABLE if isinstance(record, Unreadable) else record.fault
                    continue
                template = self.template
                thoughts, tools = template.open_thoughts, template.ignored_tools
                seen.faults[number] = fault_of_row(record, self.prompt_key, self.response_key, template)
                seen.open_thoughts[number] = template.open_thoughts > thoughts
                seen.ignored_tools[number] = template.ignored_tools > tools
            if seen.faults[number] is None:
                messages = conversation(record[self.prompt_key], record)
                sound.append((number, messages, record[self.response_key]))
                prompts.append(self.template.prompt)
        with doing(f"counting tokens of {file.path}, {file.place(start)} to {file.place(stop - 1)}"):
            self._count(seen, sound, prompts)
        return seen

    def _count(self, seen: Looks, sound: Sequence[tuple[int, Messages, str]], prompts: Sequence[str]) -> None:
        """Tokens and special tokens of sound rows, of which `prompts` are the rendered conversations."""
        numbers = np.array([number for number, _, _ in sound], dtype=np.int64)
        answers = [answer for _, _, answer in sound]
        lengths = [len(ids) for part in _slices(answers, len) for ids in self.tokenization.answers(part)]
        seen.answer_tokens[numbers] = lengths
        if self.counts_prompts:
            pairs = [(messages, prompt) for (_, messages, _), prompt in zip(sound, prompts, strict=True)]
            parts = (zip(*part, strict=True) for part in _slices(pairs, lambda pair: len(pair[1])))
            lengths = [len(ids) for part in parts for ids in self.tokenization.prompts(*part)]
            seen.prompt_tokens[numbers] = lengths
        for number, messages, answer in sound:
            seen.special[number], seen.stubborn[number] = self._specials(messages, answer)

    def _specials(self, messages: Messages, answer: str) -> tuple[bool, bool]:
        """Whether the texts have names of special tokens in them, and whether those of one stay tokens."""
        tokenizer = self.tokenization.tokenizer
        own = [*conversation_texts(messages)]
        own.append(without_eos_text(answer, self.tokenization.ends or tokenizer.eos_token))
        names = [special_names(tokenizer, text) for text in own]
        if not any(names):
            return False, False
        ids = tokenizer(own, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pairs = zip(names, ids, strict=True)
        return True, any(not set(found.values()).isdisjoint(read) for found, read in pairs)

    def key(self, file: FileRows | TurnRows, rows: int) -> str | None:
        """The name under which what is seen of a file's first rows is kept; None if it depends on more than can be
        told: a tokenizer that is not described by its files, or a template that tells the time."""
        tokenizer = self.tokenization.tokenizer
        described = _description(tokenizer)
        if described is None or tells_the_time(tokenizer, self.tokenization.template_kwargs):
            return None
        settings = [self.tokenization.ends, self.tokenization.special_text, self.prompt_key, self.response_key]
        parts = [
            platform.python_version(),
            [version(package) for package in PACKAGES],
            [hashlib.sha256(Path(source).read_bytes()).hexdigest() for source in SOURCES],
            described,
            [*settings, self.counts_prompts, self.tokenization.template_kwargs],
            [file.path.suffix, file.digest, rows],
        ]
        return f"looks-{hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()}"


def _description(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """All that makes ids of texts, or None if that is code of the model's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    added = [[number, repr(token)] for number, token in sorted(tokenizer.added_tokens_decoder.items())]
    return [type(tokenizer).__name__, backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, added]


def _slices(items: Sequence[Any], characters: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The items in order, in slices of about SLICE_CHARACTERS; one item at least."""
    part: list[Any] = []
    size = 0
    for item in items:
        part.append(item)
        size += characters(item)
        if size >= SLICE_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


# ---------------------------------------------------------------------------------------------------------------------
# All rows


def look_at_all(rows: Rows, looker: Looker, workers: int | None, cache: Cache) -> Looks:
    """Look at rows, the first ones of their files, in up to `workers` processes as far as there is enough work for
    each; those of a file that are in the cache are not looked at again."""
    parts = []
    for file, count in zip(rows.files, rows.counts(), strict=True):
        key = looker.key(file, count) if count >= CACHED_ROWS else None
        parts.append(_look_at_file(file, count, looker, workers, cache, key))
    return Looks.concatenate(parts)


def _look_at_file(
    file: FileRows | TurnRows, count: int, looker: Looker, workers: int | None, cache: Cache, key: str | None
) -> Looks:
    seen: list[Looks] = []

    def write(part: Path) -> None:
        seen.append(_look(file, count, looker, workers))
        seen[0].write(part)

    kept = None if key is None else cache.file(key, write, f"what was seen of the {count} rows of {file.path}")
    if seen:
        return seen[0]
    return _look(file, count, looker, workers) if kept is None else Looks.read(kept)


def _look(file: FileRows | TurnRows, count: int, looker: Looker, workers: int | None) -> Looks:
    processes = min(workers or 1, count // MIN_ROWS_PER_PROCESS)
    starts = range(0, count, ROWS_AT_ONCE)
    stops = [min(start + ROWS_AT_ONCE, count) for start in starts]
    parts = [Looks.empty(0)]
    with ExitStack() as stack:
        bar = tqdm(total=count, desc="looking at rows", unit="row", leave=False, dynamic_ncols=True, delay=2)
        stack.enter_context(bar)
        if processes <= 1:
            seen = (looker.look(file, start, stop) for start, stop in zip(starts, stops, strict=True))
        else:
            # Not forked: this process has threads (torch, tokenizers), and a fork may inherit a held lock.
            pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_looking,
                initargs=(looker, file),
            )
            seen = stack.enter_context(pool).map(_look_in_process, starts, stops)
        for part in seen:
            parts.append(part)
            bar.update(len(part.faults))
    return Looks.concatenate(parts)


# Of a process that looks at rows: how, and those of which file.
_looking: list[tuple[Looker, FileRows | TurnRows]] = []


def _start_looking(looker: Looker, file: FileRows | TurnRows) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _looking[:] = [(looker, file)]


def _look_in_process(start: int, stop: int) -> Looks:
    ((looker, file),) = _looking
    return looker.look(file, start, stop)
