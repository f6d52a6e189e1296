"""The end of a run in at most eight lines: what was reached, where it is, and the commands that go on from there.

What is left to train is known from the newest checkpoint's own files, so that a run without anything left ends before
Ray and models are started.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from verl.config.run import Config
from verl.monitor.live import StoppedByAlarm
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.trainer.ppo.folders import run_folder
from verl.trainer.ppo.next_commands import closing_commands, report_command
from verl.utils.checkpoint.best_link import BEST, best_step
from verl.utils.checkpoint.checkpoint_manager import STATE_FILE, step_of
from verl.utils.signals import RunSignals
from verl.utils.stalls import duration
from verl.utils.step_line import VALIDATION, number

logger = logging.getLogger(__name__)

# What is said of where the weights are, beside the validation's metrics.
TRAINED = (
    ("loss in the last step", "actor/sft_loss"),
    ("acc in the last step", "actor/soda_acc"),
    ("d_acc in the last step", "critic/d_acc"),
)
# Of metrics.jsonl, from its end: hundreds of steps.
TAIL = 1 << 20


class Loop(Protocol):
    """What the end of a run is told from."""

    global_step: int
    total_steps: int
    signals: RunSignals
    reached: Mapping[str, float]
    checkpoints: Checkpoints


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    how: in a word or two.
    step, total: of the updates, those made and those to be made.
    seconds: what this start took; None where nothing was done.
    reached: the last value of each metric.
    saved: the step of the newest checkpoint that the run has written or began with.
    whole: the run is at its end, by its own settings.
    """

    how: str
    step: int
    total: int
    seconds: float | None
    reached: Mapping[str, float]
    saved: int | None
    whole: bool


@contextmanager
def end_said(config: Config, loop: Loop, resumed: Path | None) -> Iterator[None]:
    """Around the loop: whatever ends it, the last lines say so. An error goes on its way behind them.

    Args:
        resumed: the checkpoint that the run goes on from.
    """
    began = time.monotonic()
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ended = error
        raise
    finally:
        if not config.trainer.val_only:
            seconds, saved = time.monotonic() - began, loop.checkpoints.saved_step
            if saved is None and _own(config, resumed):
                # It ended while it was being read.
                saved = step_of(resumed)
            whole = ended is None and loop.signals.received is None
            step, how = max(loop.global_step, saved or 0), _how(loop, ended)
            say_end(config, Ending(how, step, loop.total_steps, seconds, loop.reached, saved, whole))


def _own(config: Config, checkpoint: Path | None) -> bool:
    """Whether a checkpoint lies in the run's own folder."""
    return checkpoint is not None and checkpoint.parent.resolve() == run_folder(config.trainer).resolve()


def _how(loop: Loop, ended: BaseException | None) -> str:
    if isinstance(ended, StoppedByAlarm):
        return "stopped by an alarm"
    if loop.signals.received is not None:
        return f"ended by {loop.signals.received.name}" + (" at once" if ended is not None else "")
    if ended is not None:
        return "interrupted" if isinstance(ended, KeyboardInterrupt) else "failed"
    return "done" if loop.global_step >= loop.total_steps else "stopped early"


def say_end(config: Config, ending: Ending) -> None:
    """Log the lines. What fails in it ends nothing."""
    try:
        for line in ending_lines(config, ending):
            logger.info("%s", line)
    except Exception as error:
        logger.warning("the end of the run cannot be described (%s: %s)", type(error).__name__, error)


def ending_lines(config: Config, ending: Ending) -> list[str]:
    """The lines, at most eight."""
    root = run_folder(config.trainer)
    took = "" if ending.seconds is None else f", {duration(ending.seconds)} in this run"
    lines = [f"{ending.how}: {ending.step} of {ending.total} steps of {config.stage} are made{took}"]
    if reached := _reached(ending.reached):
        lines.append(f"reached: {reached}")
    lines.append(_where(config, root, ending))
    if not ending.whole or ending.step < ending.total or ending.seconds is None:
        lines.append(_how_to_go_on(config, ending))
    if ending.whole and ending.saved is not None:
        lines += closing_commands(config, root, ending.saved, ending.total)
    report = report_command(root)
    return lines if report is None else [*lines, report]


def _reached(metrics: Mapping[str, float]) -> str:
    return ", ".join(
        f"{label} {number(metrics[name]).strip()}" for label, name in (*VALIDATION, *TRAINED) if name in metrics
    )


def _where(config: Config, root: Path, ending: Ending) -> str:
    if ending.saved is None:
        return f"this run has saved no checkpoint in {root}"
    newest = f"newest checkpoint: {root / f'global_step_{ending.saved}'}"
    best, value = best_step(root), ending.reached.get("val/best/value")
    if best is None:
        return newest
    measured = "" if value is None else f", {config.trainer.best_metric} {number(value).strip()}"
    return f"{newest}; best: {root / BEST}, of step {best}{measured}"


def _how_to_go_on(config: Config, ending: Ending) -> str:
    trainer, saved = config.trainer, ending.saved
    if ending.whole and ending.step >= ending.total:
        return "to go on: the same command with more of trainer.total_training_steps, or of trainer.total_epochs"
    if ending.whole:
        patience = trainer.early_stop_patience
        return f"to go on after all: the same command with trainer.early_stop_patience above {patience}, or null"
    if saved is None:
        return "to go on: the same command, which begins anew"
    how = "" if trainer.resume_mode == "auto" else " with trainer.resume_mode=auto"
    lost = ending.step - saved
    again = f"; {lost} {'step' if lost == 1 else 'steps'} made since are made again" if lost > 0 else ""
    return f"to go on: the same command{how}, which begins with the weights of step {saved}{again}"


# ---------------------------------------------------------------------------------------------------------------------
# Before the start


def nothing_left(config: Config, total_steps: int, resumed: Path | None) -> Ending | None:
    """The end of a run that has nothing left to train; None where there is, or where it cannot be seen from the
    checkpoint it would go on from and the metrics beside it (a validation that is still due, for instance)."""
    root = run_folder(config.trainer)
    if config.trainer.val_only or not _own(config, resumed):
        return None
    state = RunState.read(resumed / STATE_FILE)
    step, metrics = state.global_step, logged_metrics(root)
    if step < total_steps and not _stopped_early(config, state):
        return None
    validates = config.data.val_files is not None and config.trainer.test_freq > 0
    if validates and not any(name.startswith("val/") for name in metrics.get(step, {})):
        return None
    how = "nothing is left to train" + ("" if step >= total_steps else " after an early stop")
    last = {name: value for values in metrics.values() for name, value in values.items()}
    return Ending(how, step, total_steps, None, last, saved=step, whole=True)


def _stopped_early(config: Config, state: RunState) -> bool:
    trainer, best = config.trainer, state.best
    if best is None or trainer.early_stop_patience is None:
        return False
    same = (best.metric, best.mode) == (trainer.best_metric, trainer.best_mode)
    return same and best.validated == state.global_step and best.misses >= trainer.early_stop_patience


def logged_metrics(root: Path) -> dict[int, dict[str, float]]:
    """The metrics of the run's last steps by step, as `metrics.jsonl` has them; empty where there is none."""
    file = root / "metrics.jsonl"
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL), os.SEEK_SET)
        lines = stream.read().splitlines()
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found[entry["step"]] = {name: float(value) for name, value in entry["data"].items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            # The first may be cut, and what others wrote there is not looked at.
            continue
    return found
