"""Prompts with the teacher's answers, as the tools read them from files, and the limits of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from verl.models.packing import AnswerRows
from verl.tools.flags import ANSWER_KEYS
from verl.utils.dataset.faults import fault_of_answer, fault_of_columns, fault_of_conversation
from verl.utils.dataset.rows import Row
from verl.utils.dataset.texts import Messages, conversation
from verl.utils.torch_functional import Truncation, postprocess_data


@dataclass(frozen=True)
class Prompt:
    """A prompt with its teacher answer, and the row that it stands in."""

    row: Row
    messages: Messages
    teacher: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return self.row.place


def as_messages(value: Any) -> Any:
    """A column's value as chat messages; a text is one user message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    return value


def read_prompt(row: Row, prompt_key: str, teacher_key: str) -> Prompt | str:
    """The row's prompt with the teacher's answer, or why there is none."""
    fault = fault_of_columns(row.record, (prompt_key, teacher_key))
    if fault:
        return fault
    messages, teacher = as_messages(row.record[prompt_key]), row.record[teacher_key]
    fault = fault_of_conversation(messages, row.record, prompt_key) or fault_of_answer(teacher, teacher_key)
    return fault or Prompt(row, conversation(messages, row.record), teacher)


def find_answer_key(record: dict[str, Any], named: str | None) -> str | None:
    """The column of a student's answers: the one that is named, or the first of ANSWER_KEYS that there is."""
    return next((key for key in (ANSWER_KEYS if named is None else (named,)) if key in record), None)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(frozen=True)
class Limits:
    """How long prompts and answers may be, in tokens; None is no limit. `context` is the model's own."""

    prompt: int | None = None
    response: int | None = None
    truncation: Truncation = "error"
    context: int | None = None


class PromptAndAnswer(NamedTuple):
    """Ids to score; `cut_group`: the teacher's answer was cut, so no EOS of the group is scored."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut_group: bool = False


def fit_prompt(prompt: list[int], limits: Limits, place: str) -> tuple[int, ...]:
    """The prompt within its limit; ValueError if it is too long and may not be cut."""
    if limits.prompt is None or len(prompt) <= limits.prompt:
        return tuple(prompt)
    if limits.truncation == "error":
        raise ValueError(
            f"{place}: the prompt has {len(prompt)} tokens, more than --max_prompt_length={limits.prompt}; raise it, "
            "cut prompts with --truncation left, right or middle, or leave the row out"
        )
    ids = torch.tensor([prompt])
    cut, _ = postprocess_data(ids, torch.ones_like(ids), limits.prompt, 0, truncation=limits.truncation)
    return tuple(cut[0].tolist())


def to_rows(sequences: Sequence[PromptAndAnswer]) -> AnswerRows:
    """Sequences as the rows of one forward."""
    return AnswerRows.of_tokens([s.prompt for s in sequences], [s.answer for s in sequences])
