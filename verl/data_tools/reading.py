"""Rows of whatever files a user has: parquet, jsonl, text, and folders as the `datasets` library saves them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from verl.utils.dataset.arrow_rows import Unreadable, stream_records
from verl.utils.dataset.rows import Row, make_row

# What a text's line becomes.
TEXT_KEY = "prompt"


def read_lines(path: Path) -> Iterator[dict[str, Any] | Unreadable]:
    """A row for every line of a text file that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield Unreadable(number, f"is not UTF-8 (byte 0x{line[error.start]:02x}): save the file as UTF-8")
                continue
            if text:
                yield {TEXT_KEY: text}


def read_arrow(path: Path) -> Iterator[dict[str, Any] | Unreadable]:
    """The rows of an Arrow stream, as `save_to_disk` writes them."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Arrow stream: {error}") from error


# What training reads, and what these tools read besides.
TRAINED = (".parquet", ".jsonl")
_READERS = dict.fromkeys(TRAINED, stream_records) | {".txt": read_lines, ".arrow": read_arrow}


def files_of(source: str) -> list[Path]:
    """The files behind a path: itself, or those of a folder.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or nothing that can be read; says what is expected.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(
                f"{path}: expected .parquet, .jsonl, .txt, or a dataset's folder, got {path.suffix or 'no'} ending; "
                "convert or rename it"
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a file or folder, got nothing there; correct the path")
    splits = saved_splits(path)
    if splits:
        raise ValueError(
            f"{path}: expected one dataset, got a dictionary of {', '.join(splits)}; name one or more, such as "
            f"{path / splits[0]}"
        )
    if (path / "state.json").is_file():
        return saved_files(path)
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"{path}: expected a folder with parquet files, or one written by save_to_disk (with state.json), got "
            "neither; name files instead"
        )
    return files


def saved_splits(folder: Path) -> list[str]:
    """The datasets of a dictionary that `save_to_disk` wrote, each a folder in this one; none where it is no such."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return []
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["splits"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected what save_to_disk writes, got {error!r}") from None


def saved_files(folder: Path) -> list[Path]:
    """The Arrow streams of a folder that `save_to_disk` wrote, in its order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'}: expected what save_to_disk writes, got {error!r}") from None
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: expected the files that state.json names, got no {', '.join(missing)}")
    return files


def read_sources(sources: Sequence[str]) -> list[Row]:
    """The rows of all sources, in order, numbered over all of them; those that cannot be read are among them, without a
    record."""
    rows: list[Row] = []
    for path in (file for source in sources for file in files_of(source)):
        first = len(rows)
        for number, record in enumerate(_READERS[path.suffix](path)):
            rows.append(make_row(path, number, first + number, record))
    if not rows:
        raise ValueError(f"{', '.join(sources)}: expected rows, got none; name other files")
    return rows
