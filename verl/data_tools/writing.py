"""Files that are whole whenever they have their names: rows, reports, charts.

Nothing here imports what takes long, so that `--help` is quick.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.utils.checkpoint.checksums import sync_to_disk

ROWS = (".parquet", ".jsonl")


def check_target(
    flag: str, name: str | Path, overwrite: bool, sources: Sequence[str] = (), endings: Sequence[str] = ROWS
) -> Path:
    """The file to write, whose folder is made with it; ValueError where it cannot be written without touching what is
    read, or what is there."""
    path = Path(name).expanduser()
    if path.suffix not in endings:
        raise ValueError(f"{flag}: expected a file that ends in {' or '.join(endings)}, got {name}; rename it")
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, got the folder {name}; name a file in it")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{flag}: expected a file in a folder, got {name}, and {there} is a file; name another")
    if any(path.resolve().is_relative_to(Path(source).expanduser().resolve()) for source in sources):
        raise ValueError(f"{flag}: expected another file than those that are read, got {name}; rename it")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag}: {name} is there already; pass --overwrite to replace it, or another name")
    return path


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written beside its place, and moved there when the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(beside)
        sync_to_disk(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_to_disk(path.parent)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, readable in any language."""
    return to_json(row) + "\n"


def to_json(value: Any) -> str:
    """On one line; what JSON has no type for as its text. Half a surrogate pair, which is no UTF-8, as its number."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def report_text(report: Mapping[str, Any]) -> str:
    """A report as readable JSON; a number that is none becomes null."""
    text = json.dumps(_without_nan(report), indent=2, ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as `report_text` has it."""
    write_whole(path, lambda file: file.write_text(report_text(report) + "\n", encoding="utf-8"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def check_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """ValueError unless a file of that ending can have the rows' columns as they are."""
    if path.suffix == ".parquet":
        _, as_text = _table(rows)
        for name, reason in as_text.items():
            raise ValueError(
                f"{path}: expected values of one type in column {name!r}, got {reason}; write .jsonl, or mend it"
            )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write rows as parquet or JSON lines, by the ending, with the columns of all of them.

    Returns:
        The columns whose values have no one type that parquet knows: they are written as JSON text.
    """
    if path.suffix == ".jsonl":
        write_whole(path, lambda file: _write_lines(file, rows))
        return []
    import pyarrow.parquet

    table, as_text = _table(rows)
    write_whole(path, lambda file: pyarrow.parquet.write_table(table, file, compression="zstd"))
    return list(as_text)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(as_line, rows))


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, str]]:
    """The rows in columns, null where a row lacks one; and of those that are JSON text now, the reason."""
    import pyarrow

    from verl.utils.dataset.texts import TOOLS_KEY

    columns: dict[str, Any] = {}
    as_text: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
            # Of objects with different fields a column makes objects with all of them, which would be other tools.
            if name == TOOLS_KEY and columns[name].to_pylist() != values:
                columns[name] = pyarrow.array([None if value is None else _as_text(value) for value in values])
            reason = "" if _can_be_written(columns[name].type) else "objects without fields"
        # Besides its own errors: half a surrogate pair, and a number of more than 64 bits.
        except (pyarrow.ArrowException, UnicodeError, OverflowError) as error:
            reason = str(error)
        if reason:
            as_text[name] = reason
            columns[name] = pyarrow.array([None if value is None else _as_text(value) for value in values])
    return pyarrow.table(columns), as_text


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return text.encode(errors="backslashreplace").decode()


def _can_be_written(kind: Any) -> bool:
    """Parquet has no objects without fields."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.num_fields > 0 and all(_can_be_written(kind.field(place).type) for place in range(kind.num_fields))
    return _can_be_written(kind.value_type) if pyarrow.types.is_list(kind) else True
