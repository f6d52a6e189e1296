"""Answers on disk, one JSON object per line, for reading and for later analysis."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    try:
        write_jsonl(path, rows)
    except OSError as error:
        logger.error("%s could not be written (%s): the run goes on without it", path, error)
