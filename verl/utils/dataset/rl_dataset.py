"""Prompts and teacher answers from parquet and jsonl files, as rows of token ids.

Every row is looked at (`looks.py`) at construction, so that bad data ends a run before it begins: its fields and what
the model's chat template makes of them (`faults.py`), lengths, the tokenizer (`tokenizer_checks.py`). Rows stay in
their files, or in Arrow (`arrow_rows.py`); a row is read and tokenised (`texts.py`) when it is asked for. Shuffling and
batching are the sampler's and the loader's business.

Shapes: P = max_prompt_length, T = max_response_length. Masks come from lengths, never from comparing with the pad id:
pad and EOS are often the same token.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from verl.utils.columns import object_array
from verl.utils.dataset.arrow_rows import FileRows
from verl.utils.dataset.cache import Cache
from verl.utils.dataset.data_files import find_files
from verl.utils.dataset.faults import warn_of_ignored_tools
from verl.utils.dataset.looks import Looker, Looks, look_at_all
from verl.utils.dataset.rows import Row, Rows, without_faults
from verl.utils.dataset.texts import (
    Messages,
    SpecialText,
    Tokenization,
    conversation,
    conversation_texts,
    eos_texts,
    without_eos_text,
)
from verl.utils.dataset.tokenizer_checks import check_ids, check_tokenizer, dated_prompt
from verl.utils.dataset.turns import TurnRows, Turns
from verl.utils.torch_functional import pad_2d_list_to_length, postprocess_data

logger = logging.getLogger(__name__)

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


def open_files(paths: Sequence[Path], cache: Cache | None = None) -> Rows:
    """The rows of all files, in order, numbered over all of them; those that cannot be read have no record.

    Args:
        cache: where the memory-mapped forms of large files are; None: where they usually are.

    Raises:
        ValueError: a file cannot be read, or has no rows.
    """
    return Rows([FileRows(path, cache or Cache()) for path in paths])


def read_rows(paths: Sequence[Path]) -> Rows:
    """`open_files` for files whose rows can all be read; ValueError names the first one that cannot."""
    rows = open_files(paths)
    unreadable = next((row.unreadable for row in rows if row.unreadable), None)
    if unreadable:
        raise ValueError(unreadable)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that are too long


def _with_fitting_prompts(rows: Rows, lengths: np.ndarray, limit: int) -> np.ndarray:
    """The mask of rows whose prompts fit; says how many do not."""
    fits = lengths <= limit
    dropped, before = rows[~fits].by_file(), rows.by_file()
    per_file = ", ".join(f"{path} {dropped[path]} of {before[path]}" for path in before if before[path])
    logger.log(
        logging.WARNING if dropped.total() else logging.INFO,
        "data.filter_overlong_prompts: dropped %d of %d rows, whose prompts have more than data.max_prompt_length=%d "
        "tokens (%s)",
        dropped.total(),
        len(rows),
        limit,
        per_file,
    )
    return fits


def _refuse_overlong(rows: Rows, lengths: np.ndarray, limit: int) -> None:
    overlong = np.flatnonzero(lengths > limit)
    if not len(overlong):
        return
    row, length = rows[int(overlong[0])], lengths[overlong[0]]
    raise ValueError(
        f"the prompt of {row.place} (counted from 0) has {length} tokens, more than "
        f"data.max_prompt_length={limit}; so have {len(overlong)} of {len(rows)} prompts. Three ways out: "
        f"data.max_prompt_length={lengths.max()} fits them all, data.filter_overlong_prompts=True drops them, "
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
        raw_prompt: the chat messages, a system message from a column of its own among them, with
            config.return_raw_chat only

    Args:
        data_files: .parquet and .jsonl files, one or several; `~` is expanded.
        tokenizer: with a chat template and an EOS token.
        config: the `data` settings.
        processor: must be None; only text is supported.
        max_samples: only the first so many rows of the files; all when negative.
        eos_token_ids: the tokens that end an answer of the model (`all_eos_token_ids`); their names at the end of an
            answer are no part of it. The tokenizer's EOS always is one.
        special_token_text: how the name of a special token within a text is read, `data.special_token_text`.
        cache_dir: where large files' rows and what was seen of rows are kept, `data.cache_dir`.
        turns: which assistant turns of whole conversations are rows (`turns.py`), `data.turns`; they count for `index`
            and `max_samples`.

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
        cache_dir: str | Path | None = None,
        turns: Turns = "none",
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
        self.cache = cache = Cache(cache_dir)
        rows = open_files(find_files(data_files), cache)
        if turns != "none":
            keys = config.prompt_key, config.response_key
            rows = Rows([TurnRows(file, turns, *keys, cache) for file in rows.files])
        rows = rows[:max_samples] if max_samples >= 0 else rows
        looker = Looker(self.tokenization, config.prompt_key, config.response_key, self._counts_prompts())
        seen = look_at_all(rows, looker, config.filter_overlong_prompts_workers, cache)
        self.rows, seen = self._usable(rows, seen)
        if not len(self.rows):
            raise ValueError(
                f"no row is left of {data_files} (max_samples={max_samples}): see the log for what was dropped"
            )
        self._check_tokens()
        self._report_special_text(seen)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self.rows[item]
        messages = self._messages(row)
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
        return sample | {"raw_prompt": list(messages)} if self.config.return_raw_chat else sample

    def messages(self, item: int) -> Messages:
        """The conversation of a row, with its tools."""
        return self._messages(self.rows[item])

    def _messages(self, row: Row) -> Messages:
        return conversation(row.record[self.config.prompt_key], row.record)

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

    def _counts_prompts(self) -> bool:
        return self.config.filter_overlong_prompts or self.config.truncation == "error"

    def _usable(self, rows: Rows, seen: Looks) -> tuple[Rows, Looks]:
        """The rows that can be used, and what was seen of them; others are an error, or left out with a count."""
        config = self.config
        _report_open_thoughts(seen)
        warn_of_ignored_tools(int(seen.ignored_tools.sum()), len(rows))
        kept = without_faults(rows, seen.faults, config.on_bad_row)
        rows, seen = rows[kept], seen[kept]
        if config.filter_overlong_prompts:
            kept = _with_fitting_prompts(rows, seen.prompt_tokens, config.max_prompt_length)
            rows, seen = rows[kept], seen[kept]
        elif config.truncation == "error":
            _refuse_overlong(rows, seen.prompt_tokens, config.max_prompt_length)
        kept = without_faults(rows, self._faults_of_tokens(rows, seen), config.on_bad_row)
        rows, seen = rows[kept], seen[kept]
        if len(rows):
            _report_answer_lengths(seen.answer_tokens, config.max_response_length)
        return rows, seen

    def _faults_of_tokens(self, rows: Rows, seen: Looks) -> np.ndarray:
        """Of each row, that its answer has no token but EOS, or None; (R,)."""
        faults = np.full(len(rows), None, dtype=object)
        for number in np.flatnonzero(seen.answer_tokens == 1):
            answer = rows[int(number)].record[self.config.response_key]
            faults[number] = (
                f"the tokenizer makes no token of the answer {answer[:40]!r}: does it belong to this model and "
                "language?"
            )
        return faults

    def _check_tokens(self) -> None:
        """Compare the tokenizer with its files on some of the data, and say what tokens do that texts do not show."""
        config = self.config
        some = self.rows[:: max(1, len(self.rows) // COMPARED_ROWS)]
        texts = [(row.record[config.response_key], row.place) for row in some]
        texts += [(text, row.place) for row in some for text in conversation_texts(self._messages(row))]
        check_ids(self.tokenizer, texts)
        first = self.rows[0]
        date = dated_prompt(self.tokenizer, config.apply_chat_template_kwargs, self._messages(first))
        if date is not None:
            logger.warning(
                "the chat template writes the date into prompts (strftime_now; %r in that of %s): they change from day "
                "to day, so a run that is resumed later goes on with other prompts than it began with; fix the date "
                "with the template's own variable, e.g. +data.apply_chat_template_kwargs.date_string='26 Jul 2024'",
                date, first.place,
            )  # fmt: skip

    def _report_special_text(self, seen: Looks) -> None:
        """Count the rows whose texts have the names of special tokens in them, and those whose names stay tokens."""
        found, stubborn = np.flatnonzero(seen.special), int(seen.stubborn.sum())
        if not len(found):
            return
        says = f"are read as {'text' if self.tokenization.special_text == 'text' else 'the tokens'}"
        if stubborn and self.tokenization.special_text == "text":
            says = f"{says}, which this tokenizer cannot do in {stubborn} of them"
        logger.warning(
            "%d of %d rows have the names of special tokens in their texts, the first being %s; these %s "
            "(data.special_token_text)", len(found), len(self.rows), self.rows[int(found[0])].place, says,
        )  # fmt: skip


def _report_open_thoughts(seen: Looks) -> None:
    if seen.open_thoughts.any():
        logger.warning(
            "the chat template opens a thought (<think> or the like) at the end of the prompt, and %d of %d answers "
            "never close it: the student would learn to give its answer as a thought; use a template that does not, or "
            "answers with the thoughts in them", seen.open_thoughts.sum(), len(seen.faults),
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
