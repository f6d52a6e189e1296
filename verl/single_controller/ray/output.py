"""What the ranks print: all of it goes to a file, and to the driver's log what a user has to know.

Ray brings their lines to the driver, where it would print each with colours and the rank's name.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher

from verl.utils.console import PrintableFormatter, printable

logger = logging.getLogger(__name__)

RAYS_OWN, OURS = "ray_print_logs", "verl_rank_output"
LOGGED = re.compile(r"(?P<level>INFO|WARNING|ERROR|CRITICAL) (?P<logger>verl[.\w]*): (?P<text>.*)")
# Last words of a rank, whoever prints them: a library's logged errors, exceptions of threads, crashes in C.
BAD = re.compile(
    r"(\([^()]*\))?\W*(ERROR|CRITICAL|FATAL)\b|Fatal Python error|terminate called|\*\*\* SIG|[\w.]+(Error|Exception): "
)
COLOUR = re.compile("\x1b\\[[\\d;]*m")
# Within this time the other ranks say the same.
SAME_S = 5.0


class _RankFormatter(PrintableFormatter):
    """One line per record: further ones begin with a tab."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n\t")


def log_in_rank() -> None:
    """In a rank: log what this package says in a form that `RankOutput` knows."""
    ours = logging.getLogger("verl")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_RankFormatter("%(levelname)s %(name)s: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


class RankOutput:
    """Takes batches of lines from Ray.

    Args:
        file: appended to; one that cannot be written is passed over.
    """

    def __init__(self, file: Path):
        self.file = file
        self._said: dict[str, float] = {}

    def take_over(self) -> None:
        """Take Ray's place."""
        for name in (RAYS_OWN, OURS):
            global_worker_stdstream_dispatcher.remove_handler(name)
        global_worker_stdstream_dispatcher.add_handler(OURS, self)

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """A batch of one process' lines, as Ray has it."""
        if batch.get("pid") == "autoscaler":
            # It counts nodes every few seconds.
            return
        # A spare process of Ray's has no name; if it dies, Ray starts another one.
        name = batch.get("actor_name") or batch.get("task_name")
        who, last_words = str(name or batch.get("pid")), bool(name)
        # Of a progress bar, which has written over itself, the end is left.
        lines = [printable(COLOUR.sub("", str(line).rstrip("\r").rpartition("\r")[2])) for line in batch["lines"]]
        with suppress(OSError), self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{who}: {line}\n" for line in lines)
        level, source = None, ""
        for line in lines:
            if level is None or not line.startswith("\t"):
                level, source, line = self._read(who, line, last_words)
            if level is not None and self._is_new(line):
                logging.getLogger(source).log(level, "%s%s", f"{who}: " if level > logging.INFO else "", line)

    @staticmethod
    def _read(who: str, line: str, last_words: bool) -> tuple[int | None, str, str]:
        """Level, logger and text of a line to be shown; a level of None: it is not."""
        found = LOGGED.fullmatch(line)
        if found is not None:
            level = getattr(logging, found["level"])
            # What all ranks do, one of them says.
            shown = level > logging.INFO or who.endswith("[rank 0]")
            return level if shown else None, found["logger"], found["text"]
        # Ray's daemon speaks up when something dies.
        shown = who == "raylet" or (last_words and BAD.match(line))
        return logging.WARNING if shown else None, logger.name, line

    def _is_new(self, text: str) -> bool:
        now = time.monotonic()
        self._said = {said: when for said, when in self._said.items() if now - when < SAME_S}
        return now - self._said.setdefault(text, now) == 0
