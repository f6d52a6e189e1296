"""Prompts and teacher answers from parquet and jsonl files, as rows of token ids.

Files are read, and every row is checked, at construction, so that bad data ends a run before it begins: its fields and
what the model's chat template makes of them (`faults.py`), lengths, the tokenizer (`tokenizer_checks.py`). Tokenising
(`texts.py`) waits until a row is asked for. Shuffling and batching are the sampler's and the loader's business.

Shapes: P = max_prompt_length, T = max_response_length. Masks come from lengths, never from comparing with the pad id:
pad and EOS are often the same token.
"""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.utils.columns import object_array
from verl.utils.dataset.faults import (
    TemplateCheck,
    fault_of_answer,
    fault_of_columns,
    fault_of_depth,
    fault_of_messages,
)
from verl.utils.dataset.rows import Row, make_row, read_jsonl, read_parquet, without_faults
from verl.utils.dataset.texts import (
    Messages,
    SpecialText,
    Tokenization,
    eos_texts,
    special_names,
    without_eos_text,
)
from verl.utils.dataset.tokenizer_checks import check_ids, check_tokenizer, dated_prompt
from verl.utils.stalls import doing
from verl.utils.torch_functional import pad_2d_list_to_length, postprocess_data

logger = logging.getLogger(__name__)

# A process first imports torch and transformers, and in that time one process tokenises about this many prompts.
MIN_PROMPTS_PER_PROCESS = 5000
# Texts are tokenised for their lengths in slices of so many characters, of which the ids take some hundred MB.
SLICE_CHARACTERS = 1_000_000
# Rows on which the tokenizer is compared with its files.
COMPARED_ROWS = 200


class DatasetConfig(Protocol):
    """The `data` settings that the dataset reads."""

    prompt_key: str
    response_key: str
    max_prompt_length: int
    max_response_length: int
    truncation: Literal["error", "left", "right", "middle"]
    filter_overlong_prompts: bool
    filter_overlong_prompts_workers: int | None
    on_bad_row: Literal["error", "skip"]
    return_raw_chat: bool
    apply_chat_template_kwargs: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def find_files(data_files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files, `~` expanded. FileNotFoundError or ValueError says which one cannot be read."""
    names = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    if not names:
        raise ValueError("no data file is given")
    paths = [Path(name).expanduser() for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such data file (looked in {Path.cwd()} for relative paths): {', '.join(missing)}")
    return paths


_READERS = {".parquet": read_parquet, ".jsonl": read_jsonl}


def read_rows(paths: Sequence[Path], keep_unreadable: bool = False) -> list[Row]:
    """The rows of all files, in order, numbered over all of them.

    Args:
        keep_unreadable: rows that cannot be read are among them, without a record.

    Raises:
        ValueError: a file cannot be read, or, unless they are kept, a row.
    """
    rows: list[Row] = []
    for path in paths:
        if path.suffix not in _READERS:
            raise ValueError(f"{path} ends in none of {', '.join(_READERS)}")
        first = len(rows)
        for number, record in enumerate(_READERS[path.suffix](path)):
            rows.append(make_row(path, number, first + number, record))
            if rows[-1].unreadable and not keep_unreadable:
                raise ValueError(rows[-1].unreadable)
        if len(rows) == first:
            raise ValueError(f"{path} has no rows")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _fault(record: Mapping[str, Any], config: DatasetConfig, template: TemplateCheck) -> str | None:
    """Why a row cannot be used, or None."""
    prompt_key, response_key = config.prompt_key, config.response_key
    fault = fault_of_columns(record, (prompt_key, response_key))
    if fault:
        return fault
    messages, answer = record[prompt_key], record[response_key]
    return (
        fault_of_messages(messages, prompt_key)
        or fault_of_answer(answer, response_key)
        or fault_of_depth(record.get("extra_info"), "'extra_info'")
        or template.fault(messages, answer)
    )


def _progress(what: str, total: int) -> tqdm:
    """A bar for what takes a while."""
    return tqdm(total=total, desc=what, unit="row", leave=False, dynamic_ncols=True, delay=2)


def _usable_rows(rows: list[Row], config: DatasetConfig, template: TemplateCheck) -> list[Row]:
    """The rows without a fault; others are an error, or left out with a count, as `on_bad_row` says."""
    faults = []
    with _progress("looking at rows", len(rows)) as bar:
        for row in rows:
            with doing(f"looking at {row.place}"):
                faults.append(row.unreadable or _fault(row.record, config, template))
            bar.update()
    if template.open_thoughts:
        logger.warning(
            "the chat template opens a thought (<think> or the like) at the end of the prompt, and %d of %d answers "
            "never close it: the student would learn to give its answer as a thought; use a template that does not, or "
            "answers with the thoughts in them", template.open_thoughts, len(rows),
        )  # fmt: skip
    return without_faults(rows, faults, config.on_bad_row)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lengths


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


def _prompt_characters(messages: Messages) -> int:
    return sum(len(message["content"]) for message in messages)


# Of a process that measures prompts: how it reads them.
_measuring: list[Tokenization] = []


def _start_measuring(tokenization: Tokenization) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _measuring[:] = [tokenization]


def _measure(conversations: Sequence[Messages]) -> list[int]:
    (tokenization,) = _measuring
    return [len(ids) for ids in tokenization.prompts(conversations)]


def _prompt_lengths_in_processes(
    tokenization: Tokenization, conversations: Sequence[Messages], workers: int | None
) -> list[int]:
    """Tokens of each prompt, counted in up to `workers` processes, as far as there is enough work for each."""
    processes = min(workers or 1, len(conversations) // MIN_PROMPTS_PER_PROCESS)
    slices = _slices(conversations, _prompt_characters)
    lengths: list[int] = []
    with ExitStack() as stack:
        bar = stack.enter_context(_progress("prompt lengths", len(conversations)))
        if processes <= 1:
            parts = ([len(ids) for ids in tokenization.prompts(part)] for part in slices)
        else:
            # Not forked: this process has threads (torch, tokenizers), and a fork may inherit a held lock.
            pool = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_measuring,
                initargs=(tokenization,),
            )
            parts = stack.enter_context(pool).map(_measure, slices)
        for part in parts:
            lengths += part
            bar.update(len(part))
    return lengths


def _drop_overlong(rows: list[Row], lengths: Sequence[int], limit: int) -> list[Row]:
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    before, after = Counter(row.path for row in rows), Counter(row.path for row in kept)
    per_file = ", ".join(f"{path} {before[path] - after[path]} of {before[path]}" for path in before)
    logger.log(
        logging.WARNING if len(kept) < len(rows) else logging.INFO,
        "data.filter_overlong_prompts: dropped %d of %d rows, whose prompts have more than data.max_prompt_length=%d "
        "tokens (%s)",
        len(rows) - len(kept),
        len(rows),
        limit,
        per_file,
    )
    return kept


def _refuse_overlong(rows: Sequence[Row], lengths: Sequence[int], limit: int) -> None:
    overlong = [(row, length) for row, length in zip(rows, lengths, strict=True) if length > limit]
    if not overlong:
        return
    row, length = overlong[0]
    raise ValueError(
        f"the prompt of {row.path}, row {row.number} (counted from 0) has {length} tokens, more than "
        f"data.max_prompt_length={limit}; so have {len(overlong)} of {len(rows)} prompts. Three ways out: "
        f"data.max_prompt_length={max(lengths)} fits them all, data.filter_overlong_prompts=True drops them, "
        "data.truncation=left, right or middle cuts them"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


def _position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Real tokens counted from 0, padding 0; as long as the mask."""
    return (attention_mask.cumsum(dim=-1) - 1) * attention_mask


class RLHFDataset(Dataset):
    """Prompts with the teacher's answers.

    A row is a dict of
        input_ids, attention_mask, position_ids: (P,), the prompt, left-padded; positions count real tokens from 0
        teacher_response: (T,), the answer and EOS, right-padded; cut to T tokens, without EOS, when that does not fit
        teacher_input_ids, teacher_attention_mask, teacher_position_ids: (P + T,), the prompt and then the answer
        raw_prompt_ids: list[int], the prompt without padding
        teacher_text: the answer as it stands in the file, without an EOS text at its end
        index, uid: the row's number over all files, as int and as str, whatever was dropped
        extra_info: the column of that name, or {}
        raw_prompt: the chat messages, with config.return_raw_chat only

    Args:
        data_files: .parquet and .jsonl files, one or several; `~` is expanded.
        tokenizer: with a chat template and an EOS token.
        config: the `data` settings.
        processor: must be None; only text is supported.
        max_samples: only the first so many rows of the files; all when negative.
        eos_token_ids: the tokens that end an answer of the model (`all_eos_token_ids`); their names at the end of an
            answer are no part of it. The tokenizer's EOS always is one.
        special_token_text: how the name of a special token within a text is read, `data.special_token_text`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is empty or unreadable, a row cannot be used (unless config.on_bad_row is "skip"), a prompt
            is too long with config.truncation "error", no row is left, or the tokenizer does not serve.
    """

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        config: DatasetConfig,
        processor: None = None,
        max_samples: int = -1,
        eos_token_ids: Sequence[int] = (),
        special_token_text: SpecialText = "text",
    ):
        if processor is not None:
            raise ValueError("only text is supported: processor must be None")
        check_tokenizer(tokenizer, config.apply_chat_template_kwargs)
        self.tokenizer = tokenizer
        self.config = config
        self._ends = eos_texts(tokenizer, eos_token_ids)
        self.tokenization = Tokenization(
            tokenizer, dict(config.apply_chat_template_kwargs), self._ends, special_token_text
        )
        # What fills the padding is never looked at, so a tokenizer without a pad token does too.
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = read_rows(find_files(data_files), keep_unreadable=True)
        rows = rows[:max_samples] if max_samples >= 0 else rows
        rows = _usable_rows(rows, config, TemplateCheck(tokenizer, config.apply_chat_template_kwargs))
        self.rows = self._rows_with_tokens(self._rows_with_fitting_prompts(rows))
        if not self.rows:
            raise ValueError(
                f"no row is left of {data_files} (max_samples={max_samples}): see the log for what was dropped"
            )
        self._check_tokens()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self.rows[item]
        messages = row.record[self.config.prompt_key]
        prompt_ids, prompt_mask = self._prompt(messages)
        answer_ids, answer_mask = self._answer(row.record[self.config.response_key])
        teacher_mask = torch.cat([prompt_mask, answer_mask])
        sample = {
            "input_ids": prompt_ids,
            "attention_mask": prompt_mask,
            "position_ids": _position_ids(prompt_mask),
            "teacher_response": answer_ids,
            "teacher_input_ids": torch.cat([prompt_ids, answer_ids]),
            "teacher_attention_mask": teacher_mask,
            "teacher_position_ids": _position_ids(teacher_mask),
            "raw_prompt_ids": prompt_ids[prompt_mask.bool()].tolist(),
            "teacher_text": without_eos_text(row.record[self.config.response_key], self._ends),
            "index": row.index,
            "uid": str(row.index),
            "extra_info": row.record.get("extra_info") or {},
        }
        return sample | {"raw_prompt": messages} if self.config.return_raw_chat else sample

    def _prompt(self, messages: Messages) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (P,) each."""
        ids = torch.tensor(self.tokenization.prompts([messages]))
        padded_ids, mask = postprocess_data(
            ids,
            torch.ones_like(ids),
            self.config.max_prompt_length,
            self.pad_token_id,
            left_pad=True,
            truncation=self.config.truncation,
        )
        return padded_ids[0], mask[0]

    def _answer(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (T,) each."""
        limit = self.config.max_response_length
        ids = self.tokenization.answers([text])[0][:limit]
        mask = (torch.arange(limit) < len(ids)).long()
        return pad_2d_list_to_length([ids], self.pad_token_id, limit)[0], mask

    def _rows_with_fitting_prompts(self, rows: list[Row]) -> list[Row]:
        config = self.config
        if not config.filter_overlong_prompts and config.truncation != "error":
            return rows
        conversations = [row.record[config.prompt_key] for row in rows]
        lengths = _prompt_lengths_in_processes(self.tokenization, conversations, config.filter_overlong_prompts_workers)
        if config.filter_overlong_prompts:
            return _drop_overlong(rows, lengths, config.max_prompt_length)
        _refuse_overlong(rows, lengths, config.max_prompt_length)
        return rows

    def _rows_with_tokens(self, rows: list[Row]) -> list[Row]:
        """The rows whose answers have a token; what does not fit is reported."""
        key = self.config.response_key
        lengths = np.zeros(len(rows), dtype=np.int64)
        done = 0
        with _progress("answer lengths", len(rows)) as bar:
            for part in _slices([row.record[key] for row in rows], len):
                lengths[done : done + len(part)] = [len(ids) for ids in self.tokenization.answers(part)]
                done += len(part)
                bar.update(len(part))
        empty = lengths == 1
        faults = [
            f"the tokenizer makes no token of the answer {row.record[key][:40]!r}: does it belong to this model and "
            "language?" if none else None
            for row, none in zip(rows, empty, strict=True)
        ]  # fmt: skip
        kept = without_faults(rows, faults, self.config.on_bad_row)
        if kept:
            _report_answer_lengths(lengths[~empty], self.config.max_response_length)
        return kept

    def _check_tokens(self) -> None:
        """Compare the tokenizer with its files on some of the data, and say what tokens do that texts do not show."""
        config = self.config
        some = self.rows[:: max(1, len(self.rows) // COMPARED_ROWS)]
        texts = [(row.record[config.response_key], row.place) for row in some]
        texts += [(message["content"], row.place) for row in some for message in row.record[config.prompt_key]]
        check_ids(self.tokenizer, texts)
        first = self.rows[0]
        date = dated_prompt(self.tokenizer, config.apply_chat_template_kwargs, first.record[config.prompt_key])
        if date is not None:
            logger.warning(
                "the chat template writes the date into prompts (strftime_now; %r in that of %s): they change from day "
                "to day, so a run that is resumed later goes on with other prompts than it began with; fix the date "
                "with the template's own variable, e.g. +data.apply_chat_template_kwargs.date_string='26 Jul 2024'",
                date, first.place,
            )  # fmt: skip
        self._report_special_text()

    def _report_special_text(self) -> None:
        """Count the rows whose texts have the names of special tokens in them, and those whose names stay tokens."""
        found, stubborn = [], 0
        for row in self.rows:
            answer = without_eos_text(row.record[self.config.response_key], self._ends)
            texts = [*(message["content"] for message in row.record[self.config.prompt_key]), answer]
            names = [special_names(self.tokenizer, text) for text in texts]
            if any(names):
                found.append(row)
                ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                pairs = zip(names, ids, strict=True)
                stubborn += any(not set(own.values()).isdisjoint(read) for own, read in pairs)
        if not found:
            return
        says = f"are read as {'text' if self.tokenization.special_text == 'text' else 'the tokens'}"
        if stubborn and self.tokenization.special_text == "text":
            says = f"{says}, which this tokenizer cannot do in {stubborn} of them"
        logger.warning(
            "%d of %d rows have the names of special tokens in their texts, the first being %s; these %s "
            "(data.special_token_text)", len(found), len(self.rows), found[0].place, says,
        )  # fmt: skip


def _report_answer_lengths(lengths: np.ndarray, limit: int) -> None:
    cut = int((lengths > limit).sum())
    percentile = int(np.percentile(lengths, 99, method="higher"))
    suggestion = f": data.max_response_length={percentile} would keep 99% whole" if percentile > limit else ""
    logger.log(
        logging.WARNING if cut else logging.INFO,
        "%d of %d teacher answers do not fit data.max_response_length=%d and are cut; their 99th percentile is %d "
        "tokens with EOS%s",
        cut,
        len(lengths),
        limit,
        percentile,
        suggestion,
    )


def collate_fn(
    rows: Sequence[Mapping[str, Any]], columns: Collection[str] | None = None
) -> dict[str, torch.Tensor | np.ndarray]:
    """B rows -> a batch: tensors stacked to (B, ...), everything else as an object array (B,).

    Args:
        columns: keep only those of these columns that the rows have; None: all.
    """
    batch: dict[str, torch.Tensor | np.ndarray] = {}
    for key, first in rows[0].items():
        if columns is not None and key not in columns:
            continue
        values = [row[key] for row in rows]
        batch[key] = torch.stack(values) if isinstance(first, torch.Tensor) else object_array(key, values)
    return batch
