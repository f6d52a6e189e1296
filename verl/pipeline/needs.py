"""The disk that a pipeline takes, and the time that its stages have left, where it is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from verl.config.run import Config
from verl.memory.estimate import MASTER, MOMENTS
from verl.monitor.reading import METRICS_FILE
from verl.pipeline.preflight import Look
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in
from verl.utils.checkpoint.room import bytes_in
from verl.utils.units import GIB


@dataclass(frozen=True)
class Room:
    """Bytes that are still to be written, and bytes that are free."""

    need: int
    free: int

    def problem(self, out: Path) -> str | None:
        """A sentence, where there is too little."""
        if self.need <= self.free:
            return None
        return (
            f"{out} has room for {self.free / GIB:.1f} GiB, and checkpoints and students need {self.need / GIB:.1f} "
            "GiB: make room, let fewer be kept (trainer.max_actor_ckpt_to_keep=1 trainer.max_critic_ckpt_to_keep=1), "
            "or put --out elsewhere"
        )


def checkpoints_there(config: Config, steps: int, part: str) -> int:
    """The most checkpoints of a part (`actor`, `critic`) that lie on the disk at one time."""
    trainer = config.trainer
    frequency = trainer.save_freq
    saved = {steps, *(range(frequency, steps + 1, frequency) if frequency > 0 else ())}
    kept = getattr(trainer, f"max_{part}_ckpt_to_keep")
    # An older one goes when a step from the newest one has succeeded. A best stays, and the one before it goes after
    # the next is there.
    most = len(saved) if kept is None else min(len(saved), kept + 1)
    return most + (2 if trainer.best_metric is not None else 0)


def disk_need(look: Look) -> int | None:
    """Bytes of a stage's checkpoints and its merged student; None where sizes are not known."""
    if look.steps is None or "actor" not in look.shapes:
        return None
    each = {part: (MASTER + MOMENTS) * shape.parameters for part, shape in look.shapes.items()}
    checkpoints = sum(size * checkpoints_there(look.config, look.steps, part) for part, size in each.items())
    dtype = getattr(torch, look.config.actor_rollout_ref.actor.fsdp_config.dtype)
    return checkpoints + dtype.itemsize * look.shapes["actor"].parameters


def room(out: Path, looks: Sequence[Look]) -> Room:
    """What all stages still need, less what lies in their folders."""
    need = 0
    for look in looks:
        there = bytes_in(out / look.stage) if checkpoints_in(out / look.stage) else 0
        need += max(0, (disk_need(look) or 0) - there)
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    return Room(need, shutil.disk_usage(place).free)


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
