"""The disk that a pipeline takes, and the time that its stages have left, where it is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from verl.model_merger.cli import DEFAULT_DTYPE
from verl.monitor.reading import METRICS_FILE
from verl.pipeline.preflight import Look
from verl.trainer.ppo.disk import checkpoints_to_come
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in
from verl.utils.checkpoint.room import amount, bytes_in, free_in, most_on_disk


@dataclass(frozen=True)
class Room:
    """Bytes that are still to be written, None where the size of a stage's is not known, and bytes that are free."""

    need: int | None
    free: int

    def problem(self, out: Path) -> str | None:
        """A sentence, where there is too little."""
        if self.need is None or self.need <= self.free:
            return None
        return (
            f"{out} has room for {amount(self.free)}, and checkpoints and students need {amount(self.need)}: make "
            "room, let fewer be kept (trainer.max_actor_ckpt_to_keep=1 trainer.max_critic_ckpt_to_keep=1), or put "
            "--out elsewhere"
        )


def disk_need(look: Look) -> int | None:
    """Bytes of a stage's checkpoints, when there are most of them, and of its merged student; None where sizes are not
    known."""
    if look.steps is None or not look.parts:
        return None
    best = look.config.trainer.best_metric is not None
    checkpoints = most_on_disk(look.parts.values(), 0, checkpoints_to_come(look.config, 0, look.steps), best)
    return checkpoints + getattr(torch, DEFAULT_DTYPE).itemsize * look.merged


def room(out: Path, looks: Sequence[Look]) -> Room:
    """What all stages that are not finished still need, less what lies in their folders."""
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    return Room(_need(out, looks), free_in(place))


def _need(out: Path, looks: Sequence[Look]) -> int | None:
    need = 0
    for look in looks:
        if look.finished is not None:
            continue
        most = disk_need(look)
        if most is None:
            return None
        there = bytes_in(out / look.stage) if checkpoints_in(out / look.stage) else 0
        need += max(0, most - there)
    return need


def seconds_left(look: Look, run: Path) -> float | None:
    """What the steps that are left will take by those that were made; None where none has been."""
    if look.steps is None or not (run / METRICS_FILE).is_file():
        return None
    taken = _step_times(run / METRICS_FILE)
    return median(taken) * max(0, look.steps - look.done) if taken else None


def _step_times(file: Path) -> list[float]:
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            seconds = json.loads(line)["data"].get("timing_s/step")
        except (ValueError, LookupError, TypeError, AttributeError):
            # Half a line, as a crash leaves it.
            continue
        if isinstance(seconds, int | float):
            found.append(float(seconds))
    return found
