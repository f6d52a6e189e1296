"""What a page shows of runs, as plain data: numbers, and sentences in English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from verl.monitor.report.answers import read_answers
from verl.monitor.report.points import fewer, points, rounded
from verl.monitor.report.provenance import read_record
from verl.monitor.rules import Rules
from verl.monitor.series import Run, Series
from verl.monitor.verdict import Words, shown_range
from verl.monitor.watch import Alarm, Watch, source_of

LANGUAGES = ("en", "zh")
# Points of a curve, in all runs together and in one.
ALL_POINTS, MOST_POINTS = 2400, 600
# A rule of this form says what is healthy for one metric as it is logged.
PLAIN = re.compile(r"^(?:median|mean|last)\('([^']+)'(?:, *\d+)?\)$")
EITHER = re.compile(r"^(.+?) if has\('([^']+)'\)\s+else (.+)$")
TEACHERS_LENGTH = "teacher's length"
QUANTILES = ("p05", "p25", "p50", "p75", "p95")
# Timings that are not part of timing_s/step.
BESIDE_STEPS = ("testing", "save_checkpoint")
# Figures at a glance: metric, and whether its first and newest values say most, or the one of the whole run.
FIGURES = {
    "val/rouge-L/mean": "course",
    "val/sft_loss": "course",
    "actor/sft_loss": "course",
    "critic/d_acc": "course",
    "val/critic/d_acc": "course",
    "critic/score_diff": "course",
    "critic/length_ratio": "course",
    "response_length/mean": "course",
    "response_length/clip_ratio": "course",
    "actor/entropy": "course",
    "perf/time_per_step": "median",
    "perf/throughput": "median",
    "perf/max_memory_allocated_gb": "most",
}


@dataclass
class Seen:
    """A run, all its steps seen: what the rules say, and the stage of each stretch of steps, [name, first, last]."""

    folder: Path
    run: Run
    watch: Watch
    stages: list[list[Any]]


def see(path: str | Path, run: Run, rules: Rules) -> Seen:
    """Look at a run's steps in order. `path` is where it was read from."""
    watch, stages = Watch(rules, run.settings), []
    for step, data in run.steps.items():
        watch.see(step, data)
        if watch.stage is not None and (not stages or stages[-1][0] != watch.stage):
            stages.append([watch.stage, step, step])
        elif stages:
            stages[-1][2] = step
    path = Path(path).expanduser()
    return Seen(path if path.is_dir() else path.parent, run, watch, stages)


def panels() -> list[dict[str, Any]]:
    """Sections of the page with what each draws (`panels.yaml`)."""
    return yaml.safe_load(Path(__file__).with_name("panels.yaml").read_text(encoding="utf-8"))


def most_points(runs: int) -> int:
    """Points of a curve on a page of so many runs."""
    return max(100, min(MOST_POINTS, ALL_POINTS // runs))


def describe(seen: Seen, runs: int) -> dict[str, Any]:
    """All that the page shows of one run, of so many beside each other."""
    run, watch = seen.run, seen.watch
    most = most_points(runs)
    drawn = [metric for section in panels() for panel in section["panels"] for metric in panel["metrics"]]
    series = {metric: found for metric in drawn if (found := _series(seen, metric)).finite()[0]}
    return {
        "name": run.name,
        "state": _state(watch),
        "verdict": {language: Words(watch, language).verdict(run) for language in LANGUAGES},
        "stages": seen.stages,
        "steps": run.made,
        "first": min(run.steps),
        "last": max(run.steps),
        "thinned": max((len(found.steps) for found in series.values()), default=0) > most,
        "alarms": [_alarm(alarm, watch) for alarm in _in_order(watch)],
        "series": {metric: points(found, most) for metric, found in series.items()},
        "bands": bands(watch, seen.stages),
        "scores": {who: found for who in ("student", "teacher") if (found := _scores(run, who, most)) is not None},
        "figures": {metric: found for metric, how in FIGURES.items() if (found := _figure(seen, metric, how))},
        "time": _time(run),
        "answers": read_answers(seen.folder),
        "record": read_record(seen.folder),
    }


def _state(watch: Watch) -> str:
    if watch.firing:
        return "alarm"
    return "blind" if watch.judged_nothing else "healthy"


# ---------------------------------------------------------------------------------------------------------------------
# Alarms and healthy ranges


def _in_order(watch: Watch) -> list[Alarm]:
    """Those that fire first, as they are to be mended, then those that are over, then notes."""
    firing = watch.firing
    over = [alarm for alarm in watch.alarms if alarm.until is not None and not alarm.is_note]
    return [*firing, *over, *(alarm for alarm in watch.alarms if alarm.is_note)]


def _alarm(alarm: Alarm, watch: Watch) -> dict[str, Any]:
    words = {language: Words(watch, language) for language in LANGUAGES}
    source = source_of(alarm, watch.firing) if alarm.until is None and not alarm.is_note else None
    return {
        "id": alarm.rule.id,
        "note": alarm.is_note,
        "since": alarm.since,
        "until": alarm.until,
        "label": {language: alarm.rule.label.text(language) for language in LANGUAGES},
        "value": rounded(alarm.value),
        "metrics": sorted(alarm.rule.value.metrics),
        "follows": None if source is None else source.rule.id,
        "says": {language: alarm.rule.says.text(language) for language in LANGUAGES},
        "range": {language: shown_range(alarm.healthy, language) for language in LANGUAGES},
        "causes": {language: _causes(alarm, words[language]) for language in LANGUAGES},
    }


def _causes(alarm: Alarm, words: Words) -> list[str]:
    lines = []
    for number, cause in enumerate(alarm.causes, start=1):
        text, knob = cause.text.text(words.language), words.knob(cause, alarm.is_note)
        lines.append(words.say("cause_line", number=number, cause=text, knob=knob).strip())
    return lines


def bands(watch: Watch, stages: list[list[Any]]) -> dict[str, list[list[Any]]]:
    """By metric, [first step, last step, lowest, highest]: where no rule raises an alarm in the stage of these steps.
    None: open."""
    found: dict[str, list[list[Any]]] = {}
    # Up to the next stage's begin, so that no gap is left between the two.
    ends = [first for _, first, _ in stages[1:]] + [last for _, _, last in stages[-1:]]
    for rule in watch.rules:
        either = EITHER.match(rule.value.text)
        text = rule.value.text if either is None else either[1] if watch.has(either[2]) else either[3]
        plain = PLAIN.match(text)
        if plain is None or rule.severity == "note":
            continue
        pieces = found.setdefault(
            plain[1], [[stage[1], end, None, None] for stage, end in zip(stages, ends, strict=True)]
        )
        for piece, (stage, _, _) in zip(pieces, stages, strict=True):
            healthy = rule.healthy.get(stage)
            if healthy is None:
                continue
            if healthy.low is not None:
                piece[2] = healthy.low if piece[2] is None else max(piece[2], healthy.low)
            if healthy.high is not None:
                piece[3] = healthy.high if piece[3] is None else min(piece[3], healthy.high)
    closed = {metric: [p for p in pieces if p[2:] != [None, None]] for metric, pieces in found.items()}
    return {metric: pieces for metric, pieces in closed.items() if pieces}


# ---------------------------------------------------------------------------------------------------------------------
# Series


def _series(seen: Seen, metric: str) -> Series:
    """A metric by the name that rules use; the teacher's mean length from the student's and their ratio."""
    if metric != TEACHERS_LENGTH:
        return seen.watch.series(seen.run, metric)
    found = Series()
    for step, data in seen.run.steps.items():
        ratio = data.get("critic/length_ratio", 0)
        if ratio > 0 and "response_length/mean" in data:
            found.add(step, data["response_length/mean"] / ratio)
    return found


def _scores(run: Run, who: str, most: int) -> dict[str, Any] | None:
    """The spread of scores over the steps: five quantiles where the run has them, else mean and standard deviation."""
    names = [f"critic/{who}_score/{quantile}" for quantile in QUANTILES]
    centre, kind = names[2], "quantiles"
    if centre not in run.metrics:
        names, kind = [f"critic/{who}_score_mean", f"critic/{who}_score_std"], "deviation"
        centre = names[0]
    rows = [(step, [data[name] for name in names]) for step, data in run.steps.items() if set(names) <= data.keys()]
    if not rows:
        return None
    kept = fewer([values[names.index(centre)] for _, values in rows], most)
    columns = zip(*(rows[place][1] for place in kept), strict=True)
    if kind == "deviation":
        mean, deviation = (list(column) for column in columns)
        low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
        columns = [low, mean, high]
    return {
        "kind": kind,
        "steps": [rows[place][0] for place in kept],
        "columns": [[rounded(value) for value in column] for column in columns],
    }


def _figure(seen: Seen, metric: str, how: str) -> list[float | None] | None:
    values = _series(seen, metric).finite()[1]
    if not values:
        return None
    if how == "course":
        return [rounded(values[0]), rounded(median(values[-5:]) if len(values) >= 20 else values[-1])]
    return [rounded(median(values) if how == "median" else max(values))]


def _time(run: Run) -> list[dict[str, Any]]:
    """Where the time went: parts of all steps, with the seconds of the whole run and of a step that had it, longest
    first. What of a step no part accounts for is `other`."""
    parts: dict[str, list[float]] = {}
    other = 0.0
    for data in run.steps.values():
        timings = {
            name.removeprefix("timing_s/"): value for name, value in _finite(data) if name.startswith("timing_s/")
        }
        whole = timings.pop("step", None)
        for name, seconds in timings.items():
            parts.setdefault(name, []).append(seconds)
        if whole is not None:
            other += max(0.0, whole - sum(value for name, value in timings.items() if name not in BESIDE_STEPS))
    if other > 0:
        parts["other"] = [other]
    rows = [
        {
            "part": name,
            "seconds": rounded(sum(seconds)),
            "mean": None if name == "other" else rounded(sum(seconds) / len(seconds)),
        }
        for name, seconds in parts.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def _finite(data: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in data.items() if rounded(value) is not None]
