"""Files of rows, whole or not there: written to another name beside it, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".parquet", ".jsonl")


def check_target(flag: str, name: str, overwrite: bool, inputs: Sequence[str], suffixes: Sequence[str]) -> Path:
    """The file to write; ValueError where it cannot be: its ending, its folder, what is there already."""
    path = Path(name).expanduser()
    if path.suffix not in suffixes:
        raise ValueError(f"{flag}: expected a file that ends in {' or '.join(suffixes)}, got {name}; rename it")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}: expected a file in a folder that there is, got {name}; make {path.parent} first")
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, got the folder {name}; name a file in it")
    if any(Path(other).expanduser().resolve() == path.resolve() for other in inputs):
        raise ValueError(f"{flag}: expected another file than those that are read, got {name}; rename it")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag}: {name} is there already; pass --overwrite to replace it, or another name")
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write rows as parquet or JSON lines, by the file's ending.

    Returns:
        The columns whose values have no one type that parquet knows: they are written as JSON text.
    """
    if path.suffix == ".parquet":
        table, as_text = _table(rows)
        import pyarrow.parquet

        _in_place(path, lambda file: pyarrow.parquet.write_table(table, file))
        return as_text
    lines = (to_json(dict(row)) + "\n" for row in rows)
    _in_place(path, lambda file: file.writelines(line.encode() for line in lines))
    return []


def write_text(path: Path, text: str) -> None:
    """Write a text, UTF-8; half a surrogate pair, which that cannot have, as its number."""
    _in_place(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def to_json(value: Any) -> str:
    """On one line; what JSON has no type for as its text. Half a surrogate pair, which is no UTF-8, as its number."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def _in_place(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            write(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
    """The rows in columns, and the names of those that are JSON text now."""
    import pyarrow

    columns: dict[str, Any] = {}
    as_text = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
            plain = _can_be_written(columns[name].type)
        # Besides its own errors: half a surrogate pair, and a number of more than 64 bits.
        except (pyarrow.ArrowException, UnicodeError, OverflowError):
            plain = False
        if not plain:
            as_text.append(name)
            texts = [value if value is None or isinstance(value, str) else to_json(value) for value in values]
            columns[name] = pyarrow.array([text and text.encode(errors="backslashreplace").decode() for text in texts])
    return pyarrow.table(columns), as_text


def _can_be_written(kind: Any) -> bool:
    """Parquet has no objects without fields."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.num_fields > 0 and all(_can_be_written(kind.field(place).type) for place in range(kind.num_fields))
    return _can_be_written(kind.value_type) if pyarrow.types.is_list(kind) else True
