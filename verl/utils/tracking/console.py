"""Metrics and answers on standard output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from verl.utils.console import printable, wrapped
from verl.utils.step_line import StepLines
from verl.utils.tracking.base import Backend, Run, Sample

_LABEL = "  {:<9}"


class ConsoleBackend(Backend):
    """The trainer's steps as one line each, at most one a second (`StepLines`); other metrics as
    `step:{n} - key:value - ...`; and the first validation samples: a few lines of each text, as wide as the terminal,
    or where there is none, 120 columns."""

    shown_samples = 3
    shown_lines = 3

    def __init__(self, run: Run):
        self.lines = StepLines(run.total_steps)

    def log(self, data: Mapping[str, float], step: int) -> None:
        lines = self.lines.of(data, step)
        if lines is not None:
            return self._write_all(lines)
        values = [
            f"{name}:{value:.6g}" if isinstance(value, float) else f"{name}:{value}" for name, value in data.items()
        ]
        self._write(" - ".join([f"step:{step}", *values]))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        columns = max(40, shutil.get_terminal_size((120, 24)).columns)
        for number, sample in enumerate(samples[: self.shown_samples], start=1):
            lines = [f"step:{step} - sample {number} of {len(samples)} - {sample.summary()}"]
            for name, text in (("prompt", sample.prompt), ("teacher", sample.teacher), ("student", sample.answer)):
                # The last column stays free: some terminals begin a new line in it.
                rows = wrapped(text, columns - len(_LABEL.format("")) - 1, self.shown_lines)
                labels = [name, *[""] * (len(rows) - 1)]
                lines += [(_LABEL.format(label) + row).rstrip() for label, row in zip(labels, rows, strict=True)]
            self._write("\n".join(lines))

    def close(self) -> None:
        self._write_all(self.lines.held_back())

    def _write_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._write(line)

    def _write(self, text: str) -> None:
        tqdm.write(printable(text))  # print would run into a progress bar's line
        sys.stdout.flush()
