"""A step's metrics as one line for people: those that matter most in its stage, in columns that stay where they are.

The rest is in the file and in TensorBoard.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]
# A label and a metric's name.
Cell = tuple[str, str]

WIDTH = 160
# Between two lines; what is validated is always shown.
PAUSE_S = 1.0
SEPARATOR = " | "
# Groups of cells by stage, the most important first: where a terminal is narrow, the last ones are left out.
Stage = tuple[tuple[Cell, ...], ...]
SEQKD: Stage = (
    (("loss", "actor/sft_loss"), ("grad", "actor/grad_norm"), ("lr", "actor/lr")),
    (("rouge", "train/rouge-L/mean"), ("len", "response_length/mean"), ("clip", "response_length/clip_ratio")),
    (("entropy", "actor/entropy"),),
)
SODA: Stage = (
    (("loss", "actor/soda_loss"), ("acc", "actor/soda_acc"), ("margin", "actor/soda_margin")),
    (("chosen", "actor/soda_chosen_reward"), ("grad", "actor/grad_norm"), ("lr", "actor/lr")),
    (("len", "response_length/mean"),),
)
ADVERSARIAL: Stage = (
    (("d_acc", "critic/d_acc"), ("diff", "critic/score_diff"), ("score", "critic/student_score_mean")),
    (("len", "response_length/mean"), ("clip", "response_length/clip_ratio")),
    (("d_loss", "critic/d_loss"), ("d_grad", "critic/grad_norm")),
    (("loss", "actor/pg_loss"), ("grad", "actor/grad_norm")),
    (("kl", "actor/kl_loss"),),
)
# In the place of one that a step lacks: a warmup by SFT trains the actor on no score.
INSTEAD: dict[str, Cell] = {"actor/pg_loss": ("sft", "actor/sft_loss")}
# The best-known of the metrics of a validation.
VALIDATION: tuple[Cell, ...] = (
    ("rouge-L", "val/rouge-L/mean"),
    ("sft_loss", "val/sft_loss"),
    ("len", "val/response_length/mean"),
    ("clip", "val/response_length/clip_ratio"),
    ("d_acc", "val/critic/d_acc"),
    ("d_acc of stored answers", "val/critic/fixed/d_acc"),
    ("task reward", "val/task_reward/mean"),
)


def number(value: float) -> str:
    """The value in five characters, right-aligned: rounded, and as 0 below 1e-9."""
    if not math.isfinite(value):
        return f"{value:5}"
    if abs(value) < 1e-9:
        value = 0.0
    if abs(value) >= 0.001 or value == 0:
        for decimals in (3, 2, 1, 0):
            text = f"{value:.{decimals}f}"
            if len(text) <= 5:
                return f"{text:>5}"
    text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{text:>5}"


def step_line(step: int, steps: int | None, metrics: Metrics, left: float | None = None, width: int = WIDTH) -> str:
    """The line of a training step, at most so wide.

    Args:
        step: counted from 0; shown is how many are done.
        steps: of the run, if that is known.
        left: seconds to the end of the run, if that is known.
    """
    digits = len(str(steps or 99999))
    head = f"step {step + 1:{digits}}" + (f"/{steps}" if steps else "")
    end = f"{number(metrics['timing_s/step'])}s" if "timing_s/step" in metrics else ""
    memory = metrics.get("perf/max_memory_allocated_gb", metrics.get("perf/cpu_memory_used_gb"))
    if memory is not None:
        end += f" {memory:3.0f}G"
    end += f" eta {_rounded(left):>6}" if left is not None else " " * 11
    parts = [head, end]
    for cells in _stage(metrics):
        longer = [*parts[:-1], _cells(cells, metrics), end]
        if len(SEPARATOR.join(longer)) <= min(width, WIDTH):
            parts = longer
    return SEPARATOR.join(parts).rstrip()


def validation_line(step: int, metrics: Metrics) -> str | None:
    """The line of a validation at a step; None where there was none."""
    shown = [f"{label} {number(metrics[name]).strip()}" for label, name in VALIDATION if name in metrics]
    return f"validation at step {step}: {', '.join(shown)}" if shown else None


STEP, CELL = re.compile(r"\bstep +(\d+)(?:/\d+)? \| (.*)"), re.compile(r"([a-z_]+) +(\S+)")
VALIDATED = re.compile(r"\bvalidation at step (\d+): (.*)")


def read_line(line: str) -> tuple[int, dict[str, str]] | None:
    """Step, counted from 0, and metrics, as texts, of a line that was shown; None: it is of no step or validation."""
    step, validated = STEP.search(line), VALIDATED.search(line)
    if step is not None:
        shown = dict(CELL.findall(step[2]))
        stage = SODA if "margin" in shown else ADVERSARIAL if "d_acc" in shown else SEQKD
        names = dict(cell for cells in (*stage, INSTEAD.values()) for cell in cells)
        read = {names[label]: value for label, value in shown.items() if label in names and value != "."}
        return int(step[1]) - 1, read
    if validated is not None:
        shown = dict(part.rpartition(" ")[::2] for part in validated[2].split(", "))
        return int(validated[1]), {name: shown[label] for label, name in VALIDATION if label in shown}
    return None


class StepLines:
    """Lines for a run's steps, where steps are fast not for all of them.

    Args:
        steps: of the run, if that is known.
    """

    def __init__(self, steps: int | None):
        self.steps = steps
        self._shown = -PAUSE_S
        self._held: str | None = None
        # When the first step had been made, and which that was.
        self._first: tuple[float, int] | None = None

    def of(self, metrics: Metrics, step: int) -> list[str] | None:
        """What to show of what is logged under a step; None: these are no metrics of the trainer's."""
        now = time.monotonic()
        trained = "training/global_step" in metrics
        validated = validation_line(step, metrics)
        if not trained and validated is None:
            return None
        lines = [] if trained else self.held_back()
        if validated is not None:
            lines.append(validated)
        if trained:
            self._held = step_line(step, self.steps, metrics, self._left(now, step), _width())
            if lines or now - self._shown >= PAUSE_S:
                self._shown = now
                lines += self.held_back()
        return lines

    def held_back(self) -> list[str]:
        """The last step's line, if it was too early for it."""
        held, self._held = self._held, None
        return [] if held is None else [held]

    def _left(self, now: float, step: int) -> float | None:
        self._first = self._first or (now, step)
        began, first = self._first
        if self.steps is None or step == first:
            return None
        return (now - began) / (step - first) * (self.steps - step - 1)


def _width() -> int:
    """Of the terminal that standard output is, at most `WIDTH`."""
    if sys.stdout is None or not sys.stdout.isatty():
        return WIDTH
    return min(WIDTH, os.get_terminal_size(sys.stdout.fileno()).columns or WIDTH)


def _rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}min" if seconds < 7200 else f"{seconds / 3600:.1f}h"


def _stage(metrics: Metrics) -> Stage:
    if "actor/soda_loss" in metrics:
        return SODA
    return ADVERSARIAL if "critic/d_acc" in metrics else SEQKD


def _cells(cells: Sequence[Cell], metrics: Metrics) -> str:
    """The cells; dots where the step lacks one, as the actor's while it is frozen."""
    texts = []
    for label, name in cells:
        shown, instead = INSTEAD.get(name, (label, name))
        if name not in metrics and instead in metrics:
            label, name = f"{shown:{len(label)}}", instead
        texts.append(f"{label} {number(metrics[name]) if name in metrics else '    .'}")
    return " ".join(texts)
