"""Rows of JSON texts: a list, an object of lists or of columns, one object, or a line each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from verl.utils.dataset.arrow_rows import Unreadable

Record = dict[str, Any] | Unreadable
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
# The keys of a message, whatever it is called in the data.
MESSAGE_KEYS = ("role", "from")


def read_json_text(text: str, name: str, lines: bool) -> tuple[str, list[Record]]:
    """What kind of JSON a text is, and its rows.

    Args:
        name: the file's, for messages.
        lines: it is said to have a row in each line, by the file's name.

    Raises:
        ValueError: it is damaged as a whole; says in which row, or line.
    """
    start = _BLANK.match(text).end()
    if start == len(text):
        raise ValueError(f"{name} has no rows")
    if text[start] == "[":
        return "JSON list", [_record(value) for value in _items(text, start + 1, name)]
    if lines:
        return "JSON lines", list(_lines(text))
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {_because(error, text)}") from error
    if text[_BLANK.match(text, end).end() :]:
        return "JSON lines", list(_lines(text))
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a list of JSON objects, nor an object of lists, but {type(value).__name__}")
    return _of_object(value, name)


def _items(text: str, position: int, name: str) -> Iterator[Any]:
    """The values of a list, from behind its bracket; an error names the row that it is in."""
    number = 0
    position = _BLANK.match(text, position).end()
    if text[position : position + 1] == "]":
        position += 1
    else:
        while True:
            try:
                value, position = _DECODER.raw_decode(text, _BLANK.match(text, position).end())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}, row {number}: is not JSON: {_because(error, text)}") from error
            yield value
            position = _BLANK.match(text, position).end() + 1
            mark = text[position - 1 : position]
            if mark == "]":
                break
            if mark != ",":
                fault = f"expected a comma or the list's end, got {mark!r}" if mark else "the file ends: is it cut?"
                raise ValueError(f"{name}, after row {number}: is not JSON: {fault}")
            number += 1
    position = _BLANK.match(text, position).end()
    if position < len(text):
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{name} goes on after the end of its list (line {line}): are these two files in one?")


def _because(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be read"
    if isinstance(error, json.JSONDecodeError):
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        return f"{error}{': is the file cut?' if cut else ''}"
    return str(error)


def _lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _line(line, number)


def _line(line: str, number: int) -> Record:
    try:
        value = json.loads(line)
    except RecursionError:
        return Unreadable(number, "is nested too deeply to be read")
    except json.JSONDecodeError as error:
        return Unreadable(number, f"is not JSON: {error.msg}")
    except ValueError as error:
        return Unreadable(number, f"is not JSON: {error}")
    record = _record(value)
    return Unreadable(number, record.fault) if isinstance(record, Unreadable) else record


def _record(value: Any) -> Record:
    """A row of a value; a bare list of messages is a row with that column."""
    if isinstance(value, list) and is_conversation(value):
        return {"messages": value}
    return value if isinstance(value, dict) else Unreadable(None, f"is not a JSON object but {type(value).__name__}")


def is_conversation(value: Any) -> bool:
    """A list that begins with something with a role."""
    return bool(isinstance(value, list) and value and isinstance(value[0], dict) and _has_role(value[0]))


def _has_role(item: dict[str, Any]) -> bool:
    return any(key in item for key in MESSAGE_KEYS)


def _of_object(value: dict[str, Any], name: str) -> tuple[str, list[Record]]:
    """The rows of one object, by what its values are."""
    values = list(value.values())
    lists = [key for key, item in value.items() if isinstance(item, list)]
    # One conversation is a list of objects too.
    if any(is_conversation(item) for item in values):
        return "one JSON object", [value]
    tables = [key for key in lists if value[key] and all(isinstance(item, dict) for item in value[key])]
    if len(tables) == 1 and len(lists) == 1:
        return f"JSON list in {tables[0]!r}", [_record(item) for item in value[tables[0]]]
    if lists and len(lists) == len(values):
        sizes = {key: len(items) for key, items in value.items()}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{key!r} {size}" for key, size in sizes.items())
            raise ValueError(f"{name} is an object of lists that are not equally long ({shown}): is a column cut?")
        return "JSON object of lists", [dict(zip(value, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(item, dict) for item in values):
        return _of_columns(value, name)
    return "one JSON object", [value]


def _of_columns(value: dict[str, dict[str, Any]], name: str) -> tuple[str, list[Record]]:
    """Rows of what pandas writes by default, {column: {row: value}}, or with orient="index", {row: {column: value}}."""
    first = list(next(iter(value.values())))
    if first and all(key.isdecimal() for key in first):
        short = next((key for key, column in value.items() if column.keys() != value[next(iter(value))].keys()), None)
        if short is not None:
            raise ValueError(f"{name} is an object of columns, of which {short!r} has other rows than the first")
        return "JSON object of columns", [{key: column[row] for key, column in value.items()} for row in first]
    return "JSON object of rows", list(value.values())
