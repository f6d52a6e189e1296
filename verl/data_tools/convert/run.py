"""From sources to the file that is written, and the report of it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from verl.data_tools.convert.conversations import LeftOut, Reader, Turn
from verl.data_tools.convert.formats import FORMATS, Layout, Wanted, in_known_letters, layouts_of, recognise
from verl.data_tools.convert.sources import Reading, Source, read_sources
from verl.data_tools.convert.text_files import check_encoding
from verl.data_tools.writing import check_target, write_rows
from verl.utils.dataset.arrow_rows import Unreadable
from verl.utils.dataset.faults import fault_of_conversation, fault_of_depth
from verl.utils.dataset.rows import refuse

PROMPT, ANSWER = "content", "teacher_response"
# Which conversation a row is of, and which of its answers it has.
CONVERSATION, TURN = "conversation", "turn"


class Left(NamedTuple):
    """Something of a row that is left out.

    row: from 0.
    turn: the answer of the row, from 0; None is the whole row.
    line: of the file, from 1, where the row cannot be read.
    """

    row: int
    turn: int | None
    reason: str
    line: int | None = None

    @property
    def place(self) -> str:
        """Where it is in its source."""
        line = "" if self.line is None else f" (line {self.line} of the file, from 1)"
        return f"row {self.row}{line}" if self.turn is None else f"row {self.row}, answer {self.turn}"


@dataclass
class Converted:
    """What became of a source."""

    source: Source
    layout: Layout
    rows: list[dict[str, Any]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    carried: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(options: argparse.Namespace) -> str:
    """Convert and write; returns the report.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    wanted = _wanted(options)
    target = check_target("--out", options.out, options.overwrite, options.inputs)
    aside = None
    if options.left_out:
        aside = check_target("--left_out", options.left_out, options.overwrite, options.inputs, (".jsonl",))
        if aside == target:
            raise ValueError(f"--left_out: expected another file than --out, got {aside}; rename it")
    reading = Reading(options.encoding, options.delimiter, options.sheet, options.split, options.subset)
    sources = [source for name in options.inputs for source in read_sources(name, reading)]
    for source in sources:
        in_known_letters(source, wanted)
    done = [_convert(source, recognise(source, wanted), wanted, options) for source in sources]
    if options.on_bad_row == "error":
        faults = [f"{one.source.name}, {left.place}: {left.reason}" for one in done for left in one.left]
        refuse(faults, f"{len(faults)} rows or answers cannot be converted", "Correct them, or pass --on_bad_row skip")
    if aside is not None:
        write_rows(aside, [row for one in done for row in _aside(one)])
    rows = [row for one in done for row in one.rows]
    if not rows:
        raise ValueError("\n".join(["no row is left, so nothing is written:", *(_report(one) for one in done)]))
    as_text = write_rows(target, rows)
    lines = [_report(one) for one in done]
    if as_text:
        lines.append(f"as JSON text, because parquet has no one type for their values: {', '.join(as_text)}")
    if aside is not None:
        lines.append(f"wrote {aside}: {sum(len(one.left) for one in done):,} left out")
    return "\n".join([*lines, f"wrote {target}: {len(rows):,} rows"])


def _wanted(options: argparse.Namespace) -> Wanted:
    if options.format is not None and options.format not in FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, got {options.format}; name one of these")
    if options.encoding is not None:
        try:
            check_encoding(options.encoding)
        except LookupError:
            raise ValueError(
                f"--encoding: expected a name such as utf-8, utf-16, gb18030, got {options.encoding}; name one of these"
            ) from None
    return Wanted(options.format, options.prompt_column, options.answer_column, options.system_column)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _convert(source: Source, layout: Layout, wanted: Wanted, options: argparse.Namespace) -> Converted:
    done = Converted(source, layout)
    last, tools, thoughts = options.turns == "last", options.tools == "text", options.reasoning == "think"
    reader = Reader(layout, wanted.system, source.text_cells, last, tools, thoughts)
    reserved = (PROMPT, ANSWER, CONVERSATION, TURN) if reader.several else (PROMPT, ANSWER)
    dropped: Counter[str] = Counter()
    bar = tqdm(
        source.records,
        desc=f"converting {source.name}",
        unit="row",
        leave=False,
        dynamic_ncols=True,
        delay=2,
        disable=None,
    )
    for number, record in enumerate(bar):
        if isinstance(record, Unreadable):
            done.left.append(Left(number, None, record.fault, record.line))
            continue
        used = reader.used_columns(record)
        extra = {name: value for name, value in record.items() if name not in used}
        dropped.update(name for name in reserved if extra.pop(name, None) is not None)
        extra = {} if options.drop_columns else extra
        turns = _turns(reader, record, layout, wanted, extra)
        made = []
        for turn in turns:
            # Training reads columns of these names as part of the prompt.
            fault = fault_of_conversation(turn.messages, extra, PROMPT) if isinstance(turn, Turn) else None
            if fault:
                done.left.append(Left(number, turn.number, fault))
            elif isinstance(turn, Turn):
                made.append({PROMPT: turn.messages, ANSWER: turn.answer} | extra)
                made[-1] |= {CONVERSATION: f"{source.name}:{number}", TURN: turn.number}
            else:
                done.left.append(Left(number, *turn))
        done.rows += made
        if made:
            done.carried.update(dict.fromkeys(extra))
    _name_turns(done)
    done.notes = [f"not kept, because it is the name of a column that is written: {name!r}" for name in dropped]
    done.notes += [f"not kept: {what}, in {count:,} rows" for what, count in reader.notes.most_common()]
    return done


def _turns(
    reader: Reader, record: dict[str, Any], layout: Layout, wanted: Wanted, extra: dict[str, Any]
) -> Iterator[Turn | tuple[int | None, str]]:
    """The turns of a row, or what is left out of it and why."""
    others = layouts_of(record, wanted)
    fault = fault_of_depth(list(extra.values()), "a column")
    if others and layout not in others:
        yield None, f"it is of another kind: {others[0]}"
    elif fault:
        yield None, fault
    else:
        try:
            yield from reader.turns(record)
        except LeftOut as reason:
            yield None, str(reason)


def _name_turns(done: Converted) -> None:
    """Leave the columns of conversations out where no row has more than one answer."""
    several = len({row[CONVERSATION] for row in done.rows}) < len(done.rows)
    for row in [] if several else done.rows:
        del row[CONVERSATION], row[TURN]


def _aside(one: Converted) -> Iterator[dict[str, Any]]:
    for left in one.left:
        record = one.source.records[left.row]
        row = {"file": one.source.name, "row": left.row, "answer": left.turn, "reason": left.reason}
        yield row | {"record": record if isinstance(record, dict) else None}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def _report(one: Converted) -> str:
    lines = [f"{one.source.name}: {one.source.kind}, {len(one.source.records):,} rows, recognised as {one.layout}"]
    lines += [f"  {note}" for note in one.source.notes]
    several = any(TURN in row for row in one.rows[:1])
    lines.append(f"  {len(one.rows):,} rows to train on{', one for each answer of a conversation' if several else ''}")
    if one.carried:
        lines.append(f"  carried along: {', '.join(one.carried)}")
    lines += [f"  {note}" for note in one.notes]
    if one.left:
        lines.append(f"  left out {len(one.left):,} (rows and answers are counted from 0):")
        counts = Counter(left.reason for left in one.left)
        for reason, count in counts.most_common():
            first = next(left for left in one.left if left.reason == reason)
            lines.append(f"    {count:,} x {reason}; first in {first.place}")
    return "\n".join(lines)
