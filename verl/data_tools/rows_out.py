"""Rows to a file that is whole whenever it has its name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from verl.utils.checkpoint.checksums import sync_to_disk

ENDINGS = (".parquet", ".jsonl")


def check_target(path: Path, overwrite: bool, sources: Sequence[str] = (), flag: str = "--out") -> None:
    """ValueError unless rows may be written there, without touching what they come from."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"{flag}: expected a file that ends in {' or '.join(ENDINGS)}, got {path}; rename it")
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, got the folder {path}; name a file in it")
    if any(path.resolve().is_relative_to(Path(source).expanduser().resolve()) for source in sources):
        raise ValueError(f"{flag}: expected another file than those that are read, got {path}; name another")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag}: expected a new file, got {path}, which exists; pass --overwrite or another name")


def check_columns(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """ValueError unless a file of that ending can have the rows' columns."""
    if path.suffix == ".parquet":
        _table(path, rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as parquet or jsonl, by the ending, with the columns of all of them; null where a row lacks one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(as_line(row) for row in rows)
        else:
            pa.parquet.write_table(_table(path, rows), temporary, compression="zstd")
        sync_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_to_disk(path.parent)


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON, readable in any language."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row, default=str)
    return text + "\n"


def _table(path: Path, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(
                f"{path}: expected values of one type in column {name!r}, got {error}; write .jsonl, or mend the column"
            ) from None
    return pa.table(columns)
