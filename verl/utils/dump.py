"""Answers on disk, for reading and for later analysis: one JSON object per line, or parquet."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.utils.checkpoint.checksums import sync_to_disk
from verl.utils.stalls import doing

logger = logging.getLogger(__name__)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to `path`, making its folder; text stays readable whatever its language."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def dump_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`write_jsonl` of what a run only shows: where the disk is full, it is said and the run goes on."""
    _or_go_on(path, partial(write_jsonl, path, rows))


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write a table to `path`, making its folder; at every moment the file is whole, or what was there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_to_disk(path.parent)


def dump_parquet(path: str | Path, table: pa.Table) -> None:
    """`write_parquet` of what a run only shows: where the disk is full, it is said and the run goes on."""
    with doing(f"writing {path}"):
        _or_go_on(path, partial(write_parquet, path, table))


def _or_go_on(path: str | Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        logger.error("%s could not be written (%s): the run goes on without it", path, error)
