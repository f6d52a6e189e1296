"""What a pipeline says before and after its stages."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from verl.pipeline.needs import Room, disk_need, seconds_left
from verl.pipeline.options import DEFAULT_STAGES
from verl.pipeline.preflight import Look
from verl.pipeline.results import JUDGE, REPORT, STUDENTS
from verl.pipeline.settings import run_folder, unused_settings, user_settings
from verl.utils.checkpoint.room import amount
from verl.utils.command_line import called_as
from verl.utils.console import table
from verl.utils.stalls import duration
from verl.utils.units import counted

BASE = "base"
NONE_CLOSER = "no student is closer to the teacher than the base model"


class Judged(NamedTuple):
    """A student at a temperature: how often fresh discriminators told it from the teacher, with its interval."""

    student: str
    temperature: float
    accuracy: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------------------------
# Before


def headline(number: int, count: int, look: Look) -> str:
    """A stage that begins, or goes on."""
    steps = "" if look.steps is None else f" of {look.steps}"
    where = f"goes on after step {look.done}{steps}" if look.done else f"{look.steps} steps"
    return f"[{number}/{count}] {look.stage}: {where}, student {look.models.student}"


def describe(options: Namespace, looks: Sequence[Look], room: Room, judging: str) -> str:
    """Everything that a dry run shows but the problems."""
    lines = [f"{options.exp_name}: {', '.join(options.stages)} in {options.out}"]
    for number, look in enumerate(looks, start=1):
        lines += _stage(options, number, look)
    names = ", ".join(options.stages)
    lines.append(f"then  merged into {options.out / STUDENTS}: {names}")
    lines.append(f"      judged: {judging}")
    lines.append(f"      report: {options.out / REPORT}")
    needed = "how much is needed is not known" if room.need is None else f"{amount(room.need)} are still needed at most"
    lines.append(f"disk  {needed}, {amount(room.free)} are free")
    lines += [f"note  {given.text} goes to no stage of this line" for given in unused_settings(options)]
    return "\n".join(lines)


def _stage(options: Namespace, number: int, look: Look) -> list[str]:
    head = f"[{number}/{len(options.stages)}] {look.stage}: "
    settings = " ".join(map(shlex.quote, user_settings(options)[look.stage])) or "as the stage has them"
    if look.finished is not None:
        return [f"{head}done, {look.finished} steps", f"      settings: {settings}"]
    steps = "steps not known" if look.steps is None else f"{look.steps} steps"
    lines = [head + steps + (f", {look.done} of them done" if look.done else "")]
    if look.rows is not None:
        lines[0] += f" ({look.rows} rows in batches of {look.config.data.train_batch_size})"
    before = options.stages[number - 2] if number > 1 else None
    lines.append(f"      student: {f'what {before} hands on' if look.models.pending else look.models.student}")
    if look.config is not None and look.config.use_critic:
        taught = look.models.pending and before == "warmup"
        lines.append(f"      discriminator: {f'what {before} hands on' if taught else look.models.critic}")
    lines.append(f"      settings: {settings}")
    if look.config is not None:
        where = f"{look.config.processes} x {look.config.trainer.device}"
        lines.append(f"      on {where}{_memory(look)}; {_disk(look)}; {_time(look, run_folder(options, look.stage))}")
    return lines


def _memory(look: Look) -> str:
    if look.config.trainer.device == "cpu":
        return ", of whose memory there is no estimate"
    return "" if torch.cuda.is_available() else ", which this machine has not: its memory is not known here"


def _disk(look: Look) -> str:
    need = disk_need(look)
    return "disk not known" if need is None else f"disk at most {amount(need)}"


def _time(look: Look, run: Path) -> str:
    seconds = seconds_left(look, run)
    if seconds is None:
        return "time not known before its first steps"
    return f"about {duration(seconds)} left by the steps made so far, validations and checkpoints apart"


def problems(found: Sequence[str]) -> str:
    """All of them, a line each."""
    return "\n".join(
        [
            f"{counted(len(found), 'problem')}, and nothing starts before that is mended:",
            *(f"  - {problem}" for problem in found),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# After


def conclude(
    options: Namespace,
    folders: Mapping[str, Path],
    same: Mapping[str, str],
    reports: Mapping[float, dict[str, Any]],
    health: Mapping[str, str],
) -> str:
    """Which student is closest, where everything lies, and what may come next.

    Args:
        folders: of each student, the base left out.
        same: those that have an earlier one's weights, and which; they are not judged.
        reports: the judge's, by temperature.
    """
    lines = [f"{options.exp_name}: {', '.join(options.stages)} done"]
    if reports:
        lines += ["", _table(reports), ""]
    best, says = closest(reports, [name for name in folders if name not in same])
    student = None if best is None else folders[best]
    lines += [f"closest to the teacher: {says}"] if says else []
    lines += [f"{stage}: {sentence}" for stage, sentence in health.items()]
    lines += ["", *(_where(stage, folder, same) for stage, folder in folders.items())]
    if reports:
        lines.append(f"{'judge:':<19} {options.out / JUDGE}")
    if (options.out / REPORT).is_file():
        lines.append(f"{'report of all runs:':<19} {options.out / REPORT}")
    return "\n".join([*lines, "", "next:", *(f"  {line}" for line in _next(options, student))])


def _where(stage: str, folder: Path, same: Mapping[str, str]) -> str:
    weights = f" (the weights of {same[stage]}'s)" if stage in same else ""
    return f"{f'student of {stage}:':<19} {folder}{weights}"


def _next(options: Namespace, best: Path | None) -> list[str]:
    """What to do with the best student; where there is none, what may make one."""
    if best is None:
        return [
            "train for more epochs (trainer.total_epochs=N), or with a higher learning rate",
            "(actor_rollout_ref.actor.optim.lr=X), under another --exp_name",
            "let the students answer at a lower temperature: the same line with --judge_temperatures 0.5",
        ]
    serve = "vllm serve" if find_spec("vllm") is not None else called_as("verl.tools.chat")
    lines = [f"{serve} {shlex.quote(str(best))}"]
    if options.stages == DEFAULT_STAGES:
        lines.append(
            "the same line with --stages seqkd,warmup,gad, to see whether GAD pays here: SeqKD is not repeated"
        )
    return lines


def _table(reports: Mapping[float, dict[str, Any]]) -> str:
    by_discriminators = all("two_sample" in e for report in reports.values() for e in report["students"].values())
    rows = [["student", *(["told from the teacher"] if by_discriminators else []), "ROUGE-L", "tokens", "cut", "loops"]]
    for temperature, report in reports.items():
        for name, entry in report["students"].items():
            n, row = entry["numbers"], [f"{name} at {temperature:g}"]
            if by_discriminators:
                row.append(_interval(entry["two_sample"]["accuracy"]))
            numbers = [f"{n['rouge_l']:.3f}", f"{n['mean_tokens']:.1f}", f"{n['cut']:.1%}", f"{n['loops']:.1%}"]
            rows.append([*row, *numbers])
    teacher = next(iter(reports.values()))["teacher"]["numbers"]
    blank = [""] if by_discriminators else []
    rows.append(
        ["teacher", *blank, "", f"{teacher['mean_tokens']:.1f}", f"{teacher['cut']:.1%}", f"{teacher['loops']:.1%}"]
    )
    return table(rows)


def _interval(test: Mapping[str, float | None]) -> str:
    """An accuracy with its interval, as JSON has them: null for what could not be told."""
    if None in (test["value"], test["low"], test["high"]):
        return "-"
    return f"{test['value']:.3f} [{test['low']:.3f}, {test['high']:.3f}]"


def closest(reports: Mapping[float, dict[str, Any]], trained: Sequence[str]) -> tuple[str | None, str]:
    """The student to take, of those trained, None where the base model is closer to the teacher than all, and a
    sentence on how far the judge says so."""
    judged = [
        Judged(name, temperature, test["value"], test["low"], test["high"])
        for temperature, report in reports.items()
        for name, entry in report["students"].items()
        if (test := entry.get("two_sample", {}).get("accuracy")) and _interval(test) != "-"
    ]
    if judged:
        return _by_accuracy(judged, trained)
    if not reports:
        return trained[-1], ""
    (temperature, report), *_ = reports.items()
    scores = {name: entry["numbers"]["rouge_l"] for name, entry in report["students"].items()}
    best = max(trained, key=lambda name: scores[name])
    if scores[BASE] >= scores[best]:
        return None, (
            f"{NONE_CLOSER}, by ROUGE-L alone: {scores[BASE]:.3f}, and {scores[best]:.3f} of {best} at temperature "
            f"{temperature:g}"
        )
    return best, (
        f"{best} by ROUGE-L alone ({scores[best]:.3f} at temperature {temperature:g}), which is a hint: only fresh "
        "discriminators (--judge_by discriminators) or a strong model "
        f"({called_as('verl.tools.judge')} --endpoint) say more"
    )


def _by_accuracy(judged: Sequence[Judged], trained: Sequence[str]) -> tuple[str | None, str]:
    ranked = sorted(judged, key=lambda one: abs(one.accuracy - 0.5))
    best = next(one for one in ranked if one.student in trained)
    bases = [one for one in judged if one.student == BASE]
    if bases and all(one.low <= 0.5 for one in bases):
        return best.student, (
            f"not decided: fresh discriminators could not tell even the base model from it ({_in_words(bases[0])}), so "
            "that they have learned nothing; take more validation prompts (300 or more), or ask "
            f"{called_as('verl.tools.judge')} with a higher --judge_lr"
        )
    if ranked[0].student == BASE:
        sure = ranked[0].high < best.low
        return None, (
            f"{NONE_CLOSER}, which is told in {_in_words(ranked[0])} of cases, and {best.student} in {_in_words(best)}"
            + ("" if sure else ": too close to call")
        )
    others = [one for one in judged if one is not best and one.low <= best.high and best.low <= one.high]
    says = (
        f"{best.student}, sampled at temperature {best.temperature:g}: told from it in {_in_words(best)} of cases, "
        "where 0.5 is a perfect student"
    )
    if others:
        near = ", ".join(f"{one.student} at {one.temperature:g}" for one in others)
        says += f"; too close to call against {near}"
    return best.student, says


def _in_words(one: Judged) -> str:
    return f"{one.accuracy:.3f} [{one.low:.3f}, {one.high:.3f}]"
