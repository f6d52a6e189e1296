"""Metrics as a line of JSON per step."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from verl.utils.tracking.base import Backend, Run, time_of

logger = logging.getLogger(__name__)


class FileBackend(Backend):
    """JSONL, one line per step: {"step": N, "data": {name: value}}, appended and on disk after every step.

    The file is VERL_FILE_LOGGER_PATH, else VERL_FILE_LOGGER_ROOT/project/experiment.jsonl, else log_dir/metrics.jsonl.
    JSON has no number for nan and the infinities, so they are the strings "nan", "inf" and "-inf"; Python's float()
    reads them. A resumed run appends: of two lines for one step, the later counts. A last line that a crash cut short
    is taken out first: its step is made again. A run that starts afresh where there is a file already moves it aside,
    to the same name with the time it was last written.
    """

    def __init__(self, run: Run):
        self.path = self._path(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What is no file, as /dev/stdout, is only written to.
        if self.path.is_file():
            if run.resumed:
                _take_out_a_cut_line(self.path)
            else:
                self.path.rename(_free(self.path.with_suffix(f".{time_of(self.path)}.jsonl")))
        # Without a buffer, so that what is on disk and what waits is known.
        self.file = self.path.open("ab", buffering=0)
        self.pending = b""

    @staticmethod
    def _path(run: Run) -> Path:
        if path := os.environ.get("VERL_FILE_LOGGER_PATH"):
            return Path(path).expanduser()
        if root := os.environ.get("VERL_FILE_LOGGER_ROOT"):
            return Path(root).expanduser() / run.project / f"{run.experiment}.jsonl"
        return run.log_dir / "metrics.jsonl"

    def log(self, data: Mapping[str, float], step: int) -> None:
        honest = {name: value if math.isfinite(value) else str(value) for name, value in data.items()}
        line = json.dumps({"step": step, "data": honest}, ensure_ascii=False, allow_nan=False) + "\n"
        self.pending += line.encode("utf-8")
        self._write()

    def _write(self) -> None:
        """Write the pending bytes; those that do not fit wait for the next step, within a line too."""
        while self.pending:
            self.pending = self.pending[self.file.write(self.pending) :]

    def close(self) -> None:
        if not self.file.closed:
            try:
                self._write()
            finally:
                self.file.close()


def _free(path: Path) -> Path:
    """The path, numbered where there is something already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _take_out_a_cut_line(path: Path) -> None:
    """End the file with its last whole line, so that the next one begins a line of its own."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        content = file.read()
        rest = content[content.rfind(b"\n") + 1 :]
        with suppress(ValueError):
            json.loads(rest)
            # Only its end is missing.
            file.write(b"\n")
            return
        logger.warning("%s ended in a line that was cut short, which is taken out: %r", path, rest[:100])
        file.truncate(len(content) - len(rest))
