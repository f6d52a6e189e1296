"""What is to be asked: prompts of a user's files, each once, with the request that goes out for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from verl.data_tools.collect.log import key_of
from verl.data_tools.reading import TEXT_KEY, read_sources
from verl.utils.dataset.rows import Row, refuse

Messages = list[dict[str, str]]
# Where prompts are looked for, in this order, unless a column is named.
PROMPT_KEYS = ("content", TEXT_KEY, "messages", "question", "instruction")


@dataclass(frozen=True)
class Prompt:
    """A conversation that an answer is wanted to, and the row's other columns."""

    messages: Messages
    columns: dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """All different ones, in order; `repeated` rows repeat one, `unusable` ones say why they cannot be asked."""

    prompts: list[Prompt]
    repeated: int
    unusable: list[str]


@dataclass(frozen=True)
class Asking:
    """How prompts are asked. `options` go into every request, null takes one out; answer number i of a prompt has
    `seed` + i."""

    model: str
    system_prompt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides its prompt."""
        return {"model": self.model, "system_prompt": self.system_prompt, "seed": self.seed, **self.options}

    @property
    def longest_answer(self) -> int | None:
        """Tokens that an answer may have, where the options say so."""
        limits = (self.options.get(name) for name in ("max_tokens", "max_completion_tokens"))
        return next((limit for limit in limits if isinstance(limit, int)), None)

    def messages(self, prompt: Prompt) -> Messages:
        """What the teacher sees: a system message of the prompt's own takes the place of the common one."""
        if self.system_prompt is None or prompt.messages[0]["role"] == "system":
            return prompt.messages
        return [{"role": "system", "content": self.system_prompt}, *prompt.messages]

    def request(self, prompt: Prompt, number: int) -> Request:
        """For a prompt's answer of that number, from 0."""
        seed = {} if self.seed is None else {"seed": self.seed + number}
        body = {"model": self.model, "messages": self.messages(prompt), **seed, **self.options}
        body = {name: value for name, value in body.items() if value is not None}
        return Request(key_of(body, number), number, body)


@dataclass(frozen=True)
class Request:
    """What is sent for one answer."""

    key: str
    number: int
    body: dict[str, Any]

    @property
    def messages(self) -> Messages:
        return self.body["messages"]


def read_prompts(sources: Sequence[str], key: str | None, on_bad_row: Literal["error", "skip"]) -> Prompts:
    """The prompts of files and folders.

    Raises:
        OSError, ValueError: one cannot be read, or has no prompts; or, unless they are skipped, a row cannot be asked.
    """
    rows = read_sources(sources)
    key = key or _find_key(rows)
    found: dict[Any, Prompt] = {}
    faults: list[str] = []
    for row in rows:
        prompt = _read(row, key)
        if isinstance(prompt, str):
            faults.append(row.unreadable or f"{row.place}: {prompt}")
        else:
            found.setdefault(_identity(prompt.messages), prompt)
    if on_bad_row == "error":
        refuse(
            faults,
            f"{len(faults)} of {len(rows)} rows cannot be asked",
            "Correct the files or --prompt_key, or leave such rows out: --on_bad_row skip",
        )
    if not found:
        raise ValueError(f"{', '.join(sources)}: expected prompts, got none that can be asked; the first: {faults[0]}")
    return Prompts(list(found.values()), len(rows) - len(faults) - len(found), faults)


def _find_key(rows: Sequence[Row]) -> str:
    """The first of PROMPT_KEYS that the first readable row has."""
    names = next((row.record for row in rows if not row.unreadable), {})
    key = next((key for key in PROMPT_KEYS if key in names), None)
    if key is None:
        raise ValueError(
            f"{rows[0].path}: expected prompts in a column {', '.join(PROMPT_KEYS)}, got {', '.join(names) or 'none'}; "
            "name it with --prompt_key"
        )
    return key


def _read(row: Row, key: str) -> Prompt | str:
    # Not at the top: what looks at rows brings transformers along, which takes seconds.
    from verl.utils.dataset.faults import fault_of_columns, fault_of_conversation
    from verl.utils.dataset.texts import SYSTEM_KEY, TOOLS_KEY, conversation, tools_of

    if row.unreadable:
        return row.unreadable
    fault = fault_of_columns(row.record, (key,))
    if fault:
        return fault
    value = row.record[key]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    # Columns that training reads as part of the prompt are part of what is asked.
    fault = fault_of_conversation(messages, row.record, key)
    if fault is None and not messages[-1]["content"].strip():
        fault = f"the last message of {key!r} is empty"
    if fault is None and tools_of(conversation(messages, row.record)):
        fault = (
            f"the column {TOOLS_KEY!r} has tools, which training would tell the student of and the teacher is not told "
            "of: leave the column out, or give it another name"
        )
    if fault:
        return fault
    # Parquet fills fields that other messages have with null, which endpoints refuse.
    messages = [
        {name: field for name, field in message.items() if field is not None}
        for message in conversation(messages, row.record)
    ]
    return Prompt(messages, {name: field for name, field in row.record.items() if name not in (key, SYSTEM_KEY)})


def _identity(messages: Messages) -> Any:
    return tuple((message["role"], message["content"]) for message in messages)
