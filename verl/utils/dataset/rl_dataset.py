"""Prompts and teacher answers from parquet and jsonl files, as rows of token ids.

Files are read, and every row is checked, at construction, so that bad data ends a run before it begins. Tokenising
waits until a row is asked for. Shuffling and batching are the sampler's and the loader's business.

Shapes: P = max_prompt_length, R = max_response_length. Masks come from lengths, never from comparing with the pad id:
pad and EOS are often the same token.
"""

import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from verl.utils.torch_functional import pad_2d_list_to_length, postprocess_data

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

SHOWN_BAD_ROWS = 10
# A process first imports torch and transformers, and in that time one process tokenises about this many prompts.
MIN_PROMPTS_PER_PROCESS = 5000


class DatasetConfig(Protocol):
    """What the dataset reads of the `data` settings."""

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


@dataclass(frozen=True)
class Row:
    """A row as it stands in its file."""

    path: Path
    number: int  # within the file, from 0
    index: int  # over all files, from 0; the same whatever is dropped
    record: dict[str, Any]


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


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # In batches, because pyarrow cannot convert a nested column of more than 2 GiB at once.
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line_number} (from 1) is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {line_number} (from 1) is not a JSON object but {type(record).__name__}"
                )
            yield record


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl}


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files, in order, numbered over all of them; ValueError for a file that cannot be read."""
    rows: list[Row] = []
    for path in paths:
        if path.suffix not in _READERS:
            raise ValueError(f"{path} ends in none of {', '.join(_READERS)}")
        first = len(rows)
        for number, record in enumerate(_READERS[path.suffix](path)):
            rows.append(Row(path, number, first + number, record))
        if len(rows) == first:
            raise ValueError(f"{path} has no rows")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def fault_of_messages(messages: Any, key: str) -> str | None:
    """What keeps `messages` from being a conversation, or None."""
    if not isinstance(messages, list):
        return f"{key!r} is not a list of chat messages but {type(messages).__name__}"
    if not messages:
        return f"{key!r} has no chat messages"
    for message in messages:
        fields = [message.get("role"), message.get("content")] if isinstance(message, dict) else []
        if not fields or not all(isinstance(field, str) for field in fields):
            return f"a message of {key!r} is not {{role: text, content: text}}"
    return None


def fault_of_answer(answer: Any, key: str) -> str | None:
    """What keeps `answer` from being a text to learn from, or None."""
    if answer is None:
        return f"the answer in {key!r} is null"
    if not isinstance(answer, str):
        return f"the answer in {key!r} is not text but {type(answer).__name__}"
    return None if answer.strip() else f"the answer in {key!r} is empty"


def _fault(record: Mapping[str, Any], prompt_key: str, response_key: str) -> str | None:
    """Why a row cannot be used, or None."""
    for key in (prompt_key, response_key):
        if key not in record:
            return f"there is no column {key!r}, only {', '.join(map(repr, record))}"
    return fault_of_messages(record[prompt_key], prompt_key) or fault_of_answer(record[response_key], response_key)


def _usable_rows(rows: list[Row], config: DatasetConfig) -> list[Row]:
    """The rows without a fault; others are an error, or left out with a count, as `on_bad_row` says."""
    faults = [_fault(row.record, config.prompt_key, config.response_key) for row in rows]
    bad = [(row, fault) for row, fault in zip(rows, faults, strict=True) if fault]
    if not bad:
        return rows
    if config.on_bad_row == "error":
        shown = [f"  {row.path}, row {row.number}: {fault}" for row, fault in bad[:SHOWN_BAD_ROWS]]
        unshown = [f"  ... and {len(bad) - SHOWN_BAD_ROWS} more"] if len(bad) > SHOWN_BAD_ROWS else []
        head = f"{len(bad)} of {len(rows)} rows cannot be used (rows of a file are counted from 0):"
        way_out = (
            "Correct the files, data.prompt_key or data.response_key, or leave such rows out: data.on_bad_row=skip"
        )
        raise ValueError("\n".join([head, *shown, *unshown, way_out]))
    counts = Counter(fault for _, fault in bad).most_common()
    reasons = "; ".join(f"{count} x {fault}" for fault, count in counts)
    logger.warning("data.on_bad_row=skip: left out %d of %d rows: %s", len(bad), len(rows), reasons)
    return [row for row, fault in zip(rows, faults, strict=True) if not fault]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer without a chat template or an EOS token."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: use the model's chat (instruct) version, "
            "or put a chat_template into its tokenizer files"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no answer could end")


# ---------------------------------------------------------------------------------------------------------------------
# Prompt lengths


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], conversations: Sequence[Messages]
) -> list[list[int]]:
    """Token ids of each conversation up to where the answer begins."""
    return tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, tokenize=True, return_dict=False, **template_kwargs
    )


def without_eos_text(text: str, eos_token: str) -> str:
    """An answer without the EOS text, or several, at its end, and the white space around them."""
    end = text.rstrip()
    return without_eos_text(end.removesuffix(eos_token), eos_token) if end.endswith(eos_token) else text


def tokenize_answers(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each answer with one EOS at its end, also where the text ends in the EOS text itself."""
    texts = [without_eos_text(text, tokenizer.eos_token) for text in texts]
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], conversations: Sequence[Messages]
) -> list[int]:
    return [len(ids) for ids in tokenize_prompts(tokenizer, template_kwargs, conversations)]


def _one_thread_per_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _prompt_lengths_in_processes(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    conversations: Sequence[Messages],
    workers: int | None,
) -> list[int]:
    """_prompt_lengths in up to `workers` processes, as far as there is enough work for each."""
    processes = min(workers or 1, len(conversations) // MIN_PROMPTS_PER_PROCESS)
    measure = partial(_prompt_lengths, tokenizer, dict(template_kwargs))
    if processes <= 1:
        return measure(conversations)
    bounds = [len(conversations) * i // processes for i in range(processes + 1)]
    parts = [conversations[bounds[i] : bounds[i + 1]] for i in range(processes)]
    # Not forked: this process has threads (torch, tokenizers), and a fork may inherit a held lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread_per_process) as pool:
        return [length for part in pool.map(measure, parts) for length in part]


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
    """Real tokens counted from 0, padding 0, (T,) -> (T,)."""
    return (attention_mask.cumsum(dim=-1) - 1) * attention_mask


class RLHFDataset(Dataset):
    """Prompts with the teacher's answers.

    A row is a dict of
        input_ids, attention_mask, position_ids: (P,), the prompt, left-padded; positions count real tokens from 0
        teacher_response: (R,), the answer and EOS, right-padded; cut to R tokens, without EOS, when that does not fit
        teacher_input_ids, teacher_attention_mask, teacher_position_ids: (P + R,), the prompt and then the answer
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
    ):
        if processor is not None:
            raise ValueError("only text is supported: processor must be None")
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.config = config
        # What fills the padding is never looked at, so a tokenizer without a pad token does too.
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = read_rows(find_files(data_files))
        rows = _usable_rows(rows[:max_samples] if max_samples >= 0 else rows, config)
        self.rows = self._rows_with_fitting_prompts(rows)
        if not self.rows:
            raise ValueError(
                f"no row is left of {data_files} (max_samples={max_samples}): see the log for what was dropped"
            )
        self._check_answer_lengths()

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
            "teacher_text": without_eos_text(row.record[self.config.response_key], self.tokenizer.eos_token),
            "index": row.index,
            "uid": str(row.index),
            "extra_info": row.record.get("extra_info") or {},
        }
        return sample | {"raw_prompt": messages} if self.config.return_raw_chat else sample

    def _prompt(self, messages: Messages) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (P,) each."""
        ids = torch.tensor(tokenize_prompts(self.tokenizer, self.config.apply_chat_template_kwargs, [messages]))
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
        """Ids and mask, (R,) each."""
        limit = self.config.max_response_length
        ids = tokenize_answers(self.tokenizer, [text])[0][:limit]
        mask = (torch.arange(limit) < len(ids)).long()
        return pad_2d_list_to_length([ids], self.pad_token_id, limit)[0], mask

    def _rows_with_fitting_prompts(self, rows: list[Row]) -> list[Row]:
        config = self.config
        if not config.filter_overlong_prompts and config.truncation != "error":
            return rows
        conversations = [row.record[config.prompt_key] for row in rows]
        lengths = _prompt_lengths_in_processes(
            self.tokenizer, config.apply_chat_template_kwargs, conversations, config.filter_overlong_prompts_workers
        )
        if config.filter_overlong_prompts:
            return _drop_overlong(rows, lengths, config.max_prompt_length)
        _refuse_overlong(rows, lengths, config.max_prompt_length)
        return rows

    def _check_answer_lengths(self) -> None:
        limit = self.config.max_response_length
        texts = [row.record[self.config.response_key] for row in self.rows]
        lengths = np.array([len(ids) for ids in tokenize_answers(self.tokenizer, texts)])
        if lengths.min() == 1:
            row = self.rows[int(lengths.argmin())]
            raise ValueError(
                f"{row.path}, row {row.number}: the tokenizer makes no token of the answer {texts[lengths.argmin()]!r} "
                f"({int((lengths == 1).sum())} such rows): does it belong to this model and language?"
            )
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


def _object_array(values: Sequence[Any]) -> np.ndarray:
    # One by one: numpy would turn lists of equal length into a second axis.
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def collate_fn(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | np.ndarray]:
    """B rows -> a batch: tensors stacked to (B, ...), everything else as an object array (B,)."""
    batch: dict[str, torch.Tensor | np.ndarray] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = _object_array(values)
    return batch
