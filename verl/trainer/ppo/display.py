"""What a run shows: its trackers, its health, the progress bar, and the answers of each step in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.batch import Prompts, Scores
from verl.config.run import Config
from verl.monitor.live import Monitor
from verl.trainer.ppo.folders import run_folder
from verl.trainer.ppo.run_record import keep_record
from verl.trainer.ppo.val_samples import set_val_samples_aside
from verl.utils.dump import dump_jsonl
from verl.utils.tracking import Tracking

# What the progress bar shows, where a step has it.
SHOWN = {
    "actor/sft_loss": "loss",
    "actor/soda_loss": "loss",
    "actor/soda_acc": "acc",
    "critic/d_acc": "d_acc",
    "critic/score_diff": "score_diff",
    "response_length/mean": "length",
    "val/rouge-L/mean": "val rouge-L",
}


def open_tracking(config: Config, step: int, total_steps: int) -> Tracking:
    """The trackers of a run of so many steps that begins, or goes on, with this one."""
    trainer = config.trainer
    if step == 0:
        set_val_samples_aside(run_folder(trainer))
    return Tracking(
        trainer.project_name,
        trainer.experiment_name,
        trainer.logger,
        config=asdict(config),
        log_dir=trainer.default_local_dir,
        resumed=step > 0,
        # A look at an earlier checkpoint makes no step again.
        first_step=None if trainer.val_only else step,
        total_steps=total_steps,
        tensorboard_dir=trainer.default_tensorboard_dir,
    )


def open_monitor(config: Config, tracking: Tracking, step: int) -> Monitor:
    """What watches the health of a run that begins, or goes on, with this step. What is run is recorded with it."""
    trainer = config.trainer
    folder = run_folder(trainer)
    keep_record(config, folder, resumed=step > 0)
    return Monitor(asdict(config), folder, tracking, step, trainer.monitor_rules, trainer.on_alarm)


def progress_bar(stage: str, steps: int, done: int) -> tqdm:
    """A bar of the run's steps, at a terminal; elsewhere nothing, as it would leave a line per step and no end of
    control characters."""
    return tqdm(total=steps, initial=done, desc=stage, unit="step", dynamic_ncols=True, disable=None)


def show_step(bar: tqdm, metrics: Mapping[str, float], in_lines: bool) -> None:
    """One step further, with its metrics that matter most unless lines above the bar have them."""
    if not in_lines:
        shown = {label: f"{metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics}
        bar.set_postfix(shown, refresh=False)
    bar.update()


def dump_answers(path: Path, prompts: Prompts, texts: list[str], scores: Scores | None) -> None:
    """Write a step's answers, one prompt a line, beside the teacher's and with their scores, if there are any."""
    per_prompt = len(texts) // len(prompts)
    rows: list[dict[str, Any]] = []
    for row, teacher in enumerate(prompts.teacher_text):
        entry = {"index": int(prompts.index[row]), "teacher": teacher}
        entry["answers"] = texts[row * per_prompt : (row + 1) * per_prompt]
        if scores is not None:
            entry["scores"] = scores.student_scores[row].tolist()
            entry["teacher_score"] = scores.teacher_scores[row].item()
        rows.append(entry)
    dump_jsonl(path, rows)
