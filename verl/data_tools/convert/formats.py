"""Which format rows are in, told by their columns and by what is in them.

A row may fit several formats, and a file's rows several: either is an error that names both, as a guess would train on
the wrong text. What a named column or format says goes before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from verl.data_tools.convert.json_files import is_conversation
from verl.data_tools.convert.sources import Source

SHAREGPT, MESSAGES, ALPACA, COLUMNS, PREFERENCE, VERL = FORMATS = (
    "sharegpt", "messages", "alpaca", "prompt_response", "preference", "verl",
)  # fmt: skip
CONVERSATIONS = ("conversations", "conversation", "messages", "dialogue", "dialog", "items", "chat")
PROMPTS = ("prompt", "question", "query", "content", "input", "user", "problem", "问题", "提问")
ANSWERS = ("response", "completion", "answer", "output", "teacher_response", "reply", "assistant", "回答", "答案")
ALPACA_ANSWERS = ("output", "response", "completion", "answer", "chosen")
INSTRUCTION, HISTORY, CHOSEN, REJECTED = "instruction", "history", "chosen", "rejected"
# Beside the instruction: Alpaca's, Dolly's.
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
GROUND_TRUTH = "reward_model.ground_truth"
_KNOWN = frozenset(
    (*CONVERSATIONS, *PROMPTS, *ANSWERS, *ALPACA_ANSWERS, *INPUTS, *SYSTEMS, INSTRUCTION, HISTORY, CHOSEN, REJECTED)
)


@dataclass(frozen=True)
class Wanted:
    """What is named by hand; None is what the rows say."""

    format: str | None = None
    prompt: str | None = None
    answer: str | None = None
    system: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns that are named."""
        return [column for column in (self.prompt, self.answer, self.system) if column is not None]


class Layout(NamedTuple):
    """A format with the columns of prompts and answers; None is a conversation that has both."""

    format: str
    prompt: str | None
    answer: str | None = None

    def __str__(self) -> str:
        columns = [
            f"{what} {column!r}"
            for what, column in (("prompt", self.prompt), ("answer", self.answer))
            if column is not None
        ]
        if self.answer is None:
            columns = [f"column {self.prompt!r}"]
        return f"{self.format} ({', '.join(columns)})"


def value_of(record: Mapping[str, Any], column: str) -> Any:
    """A column's value; of a name with dots that is no column, the value within columns. KeyError if there is none."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = unpacked(value)
        if not isinstance(value, Mapping):
            raise KeyError(column)
        value = value[part]
    return value


def has(record: Mapping[str, Any], column: str) -> bool:
    """Whether there is a value in the column that is not null."""
    try:
        return value_of(record, column) is not None
    except KeyError:
        return False


def unpacked(value: Any) -> Any:
    """A value, or what the JSON text in its place says: lists in CSV and Excel files."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Of a row


def layouts_of(record: Mapping[str, Any], wanted: Wanted) -> list[Layout]:
    """The layouts that a row fits, each once."""
    found = [*_conversations(record, wanted), *_columns(record, wanted)]
    return [layout for layout in dict.fromkeys(found) if wanted.format in (None, layout.format)]


def _conversations(record: Mapping[str, Any], wanted: Wanted) -> Iterator[Layout]:
    names = CONVERSATIONS if wanted.prompt is None else (wanted.prompt,)
    for name in names:
        value = unpacked(value_of(record, name)) if has(record, name) and wanted.answer is None else None
        if not is_conversation(value):
            # A named format is a promise of what is there; what does not hold is said row by row.
            if value is not None and wanted.prompt is not None and wanted.format in (SHAREGPT, MESSAGES):
                yield Layout(wanted.format, name)
            continue
        yield Layout(MESSAGES if {"role", "content"} <= value[0].keys() else SHAREGPT, name)
        if has(record, CHOSEN) and has(record, REJECTED):
            yield Layout(PREFERENCE, name, CHOSEN)


def _columns(record: Mapping[str, Any], wanted: Wanted) -> Iterator[Layout]:
    alpaca = wanted.prompt in (None, INSTRUCTION) and has(record, INSTRUCTION)
    answers = [name for name in _names(wanted.answer, ALPACA_ANSWERS) if has(record, name)]
    if alpaca:
        yield from (Layout(ALPACA, INSTRUCTION, name) for name in answers)
    if wanted.answer is None and isinstance(unpacked(record.get("reward_model")), Mapping):
        yield from (
            Layout(VERL, name, GROUND_TRUTH) for name in _names(wanted.prompt, ("prompt",)) if has(record, name)
        )
    taken = {INSTRUCTION, *INPUTS} if alpaca and answers else set()
    prompts = [name for name in _names(wanted.prompt, PROMPTS) if has(record, name) and name not in taken]
    answers = [name for name in _names(wanted.answer, (*ANSWERS, CHOSEN)) if has(record, name)]
    for answer in answers:
        kind = PREFERENCE if answer == CHOSEN else COLUMNS
        whole = unpacked(record[CHOSEN]) if kind == PREFERENCE else None
        if wanted.prompt is None and is_conversation(whole) and len(whole) > 1:
            yield Layout(PREFERENCE, None, CHOSEN)
        else:
            yield from (Layout(kind, prompt, answer) for prompt in prompts if prompt != answer)


def _names(named: str | None, usual: Sequence[str]) -> Sequence[str]:
    return usual if named is None else (named,)


# ---------------------------------------------------------------------------------------------------------------------
# Of a file


def in_known_letters(source: Source, wanted: Wanted) -> None:
    """Rename columns that are known but for capital letters, as tables have them; says so in the source's notes."""
    columns = {name: None for record in source.records if isinstance(record, dict) for name in record}
    names = {
        name: name.lower()
        for name in columns
        if name.lower() in _KNOWN and name.lower() not in columns and name not in wanted.columns
    }
    if not names or len(set(names.values())) < len(names):
        return
    source.records = [
        {names.get(name, name): value for name, value in record.items()} if isinstance(record, dict) else record
        for record in source.records
    ]
    source.notes += [f"the column {name!r} is read as {known!r}" for name, known in names.items()]


def recognise(source: Source, wanted: Wanted) -> Layout:
    """The one layout of a source's rows.

    Raises:
        ValueError: none fits, a row fits two, or rows fit different ones; says what to name.
    """
    columns: dict[str, None] = {}
    first: dict[Layout, int] = {}
    readable = False
    for number, record in enumerate(source.records):
        if not isinstance(record, dict):
            continue
        readable = True
        columns.update(dict.fromkeys(record))
        layouts = layouts_of(record, wanted)
        if len(layouts) > 1:
            raise ValueError(f"{source.place(number)}: fits {_listed(layouts)}; {_way_out(layouts)}")
        for layout in layouts:
            first.setdefault(layout, number)
        if len(first) > 1:
            (one, at), (other, number) = first.items()
            raise ValueError(
                f"{source.name} has rows of two kinds: row {at} fits {one}, row {number} fits {other}; "
                f"{_way_out(list(first))}: rows of the other kind are then left out"
            )
    if not readable:
        first_row = source.records[0]
        raise ValueError(f"{source.place(0)}: {first_row.fault}; no row of it can be read")
    for column in wanted.columns:
        if not any(isinstance(record, dict) and has(record, column) for record in source.records):
            raise ValueError(f"{source.name} has nothing in a column {column!r}, only {_quoted(columns)}")
    if not first:
        raise ValueError(f"{source.name}: {_unknown(columns, wanted)}")
    return next(iter(first))


def _listed(layouts: Sequence[Layout]) -> str:
    return " and ".join(str(layout) for layout in layouts)


def _way_out(layouts: Sequence[Layout]) -> str:
    """The flag that tells two layouts apart."""
    if len({layout.format for layout in layouts}) == len(layouts):
        return "say which with --format " + " or ".join(layout.format for layout in layouts)
    flags = []
    if len({layout.prompt for layout in layouts}) > 1:
        flags.append("--prompt_column")
    if len({layout.answer for layout in layouts}) > 1:
        flags.append("--answer_column")
    return f"say which with {' and '.join(flags)}"


def _quoted(columns: Mapping[str, None]) -> str:
    return ", ".join(map(repr, columns))


def _unknown(columns: Mapping[str, None], wanted: Wanted) -> str:
    what = f"the format {wanted.format}" if wanted.format else f"any format ({', '.join(FORMATS)})"
    lists = [name for name in columns if name in CONVERSATIONS]
    why = f"; {lists[0]!r} has no list of messages with role and content, or from and value" if lists else ""
    half = [name for name in columns if name in (*PROMPTS, INSTRUCTION)]
    if half and not lists:
        why = f"; there are prompts in {half[0]!r}, but no answers (verl.data_tools.collect asks a teacher for them)"
    elif not lists and (answers := [name for name in columns if name in ANSWERS]):
        why = f"; there are answers in {answers[0]!r}, but no prompts"
    return (
        f"its columns {_quoted(columns)} are not those of {what}{why}; name them with --prompt_column and "
        "--answer_column (a conversation in one column: --prompt_column and --format messages)"
    )
