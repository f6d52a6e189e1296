"""What the judge found, as a table for the terminal, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from verl.tools.judge.numbers import Numbers
from verl.tools.judge.pairwise import Pairwise
from verl.tools.judge.statistics import CONFIDENCE, CROSS_VALIDATED, Estimate, paired_difference
from verl.tools.judge.two_sample import MATCHES, TwoSample

INTERVAL = f"{CONFIDENCE:.0%} t-interval, clustered by prompt"
WIDENED = f"widened {CROSS_VALIDATED:.3g} times for cross-validation"
# A discriminator that does not even know its own training pairs says nothing about others.
KNOWS = 0.7


@dataclass(frozen=True)
class Verdict:
    """All about one student; None for what was not asked."""

    numbers: Numbers
    two_sample: TwoSample | None = None
    pairwise: Pairwise | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _estimate(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None or not estimate.count:
        return "-", ""
    return _number(estimate.value, ".3f"), f"[{estimate.low:.3f}, {estimate.high:.3f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def render(verdicts: Mapping[str, Verdict], teacher: Numbers, against: str, asked: str) -> str:
    """The whole report. `verdicts` by student in the order of the command line, the reference's own left without
    judges."""
    parts = [_numbers_table(verdicts, teacher)]
    judged = {name: v.two_sample for name, v in verdicts.items() if v.two_sample}
    if judged:
        parts.append(_two_sample_table(judged, against))
    asked_of = {name: v.pairwise for name, v in verdicts.items() if v.pairwise}
    if asked_of:
        parts.append(_pairwise_table(asked_of, against, asked))
    return "\n\n".join(parts)


def _two_sample_table(judged: Mapping[str, TwoSample], against: str) -> str:
    head = (
        f"told from {against} by fresh discriminators (0.5: cannot be told; {INTERVAL} and {WIDENED}; ties count half)"
    )
    rows = [["", "accuracy", "", *(part for gap in MATCHES for part in (f"lengths within {gap:.0%}", "", "pairs"))]]
    rows[0] += ["by seed", "on its training pairs"]
    for name, test in judged.items():
        row = [name, *_estimate(test.accuracy)]
        for gap in MATCHES:
            matched = test.matched(gap)
            row += [*_estimate(matched), f"{matched.count} of {len(test.prompts)}"]
        rows.append([*row, " ".join(f"{value:.3f}" for value in test.by_seed), f"{test.fitted:.3f}"])
    return "\n".join([head, _table(rows), *changes(judged, against), *_doubts(judged)])


def changes(judged: Mapping[str, TwoSample], against: str) -> list[str]:
    """A sentence for each student after the first: whether it is closer than the one before it, prompt by prompt."""
    lines = []
    for (before, earlier), (name, later) in pairwise(judged.items()):
        sides = (later.per_pair, later.prompts), (earlier.per_pair, earlier.prompts)
        change = paired_difference(*sides, widening=CROSS_VALIDATED)
        if change.high < 0:
            says = f"{name} is closer to {against} than {before}"
        elif change.low > 0:
            says = f"{name} is further from {against} than {before}"
        else:
            says = f"{name} or {before}: too close to call"
        lines.append(f"{says} (accuracy {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])")
    return lines


def _doubts(judged: Mapping[str, TwoSample]) -> list[str]:
    weak = [name for name, test in judged.items() if test.fitted < KNOWS and test.accuracy.low <= 0.5]
    if not weak:
        return []
    told = ", ".join(f"{name} ({judged[name].fitted:.3f})" for name in weak)
    return [
        f"warning: told badly even on the pairs trained on, in less than {KNOWS:g} of them: {told}. An accuracy near "
        "0.5 proves nothing there: either there is no difference, or the discriminators have learned nothing. See that "
        "they tell the base model, or raise --judge_lr or --judge_epochs"
    ]


def _pairwise_table(asked_of: Mapping[str, Pairwise], against: str, asked: str) -> str:
    than = f"closer to the teacher's than {against}'s" if asked == "closer" else f"better than {against}'s"
    head = f"judged {than}, in both orders (0.5: as often as not; {INTERVAL}; ties count half)"
    rows = [["", "win rate", "", "wins", "ties", "losses", "first place", "identical", "unreadable"]]
    for name, result in asked_of.items():
        counts = [str(n) for n in (result.wins, result.ties, result.losses)]
        places = [f"{result.first_place:.3f}", str(result.identical), str(result.unreadable)]
        rows.append([name, *_estimate(result.win_rate), *counts, *places])
    return "\n".join([head, _table(rows)])


def _numbers_table(verdicts: Mapping[str, Verdict], teacher: Numbers) -> str:
    rows = [["answers", "ROUGE-L", "tokens", "median", "of teacher's", "cut", "loops", "distinct 1..4-grams"]]
    for name, n in [*((name, verdict.numbers) for name, verdict in verdicts.items()), ("teacher", teacher)]:
        lengths = [f"{n.mean_tokens:.1f}", f"{n.median_tokens:.1f}", f"{n.length_ratio:.2f}"]
        shares = [f"{n.cut:.1%}", f"{n.loops:.1%}", " ".join(f"{value:.3f}" for value in n.distinct)]
        rows.append([name, f"{n.rouge_l:.3f}", *lengths, *shares])
    return _table(rows)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def to_json(verdicts: Mapping[str, Verdict], teacher: Numbers, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, with numbers as they are; nan becomes null."""
    students = {}
    for name, verdict in verdicts.items():
        entry: dict[str, Any] = {"numbers": asdict(verdict.numbers)}
        if test := verdict.two_sample:
            matched = {f"lengths_within_{gap:g}": asdict(test.matched(gap)) for gap in MATCHES}
            entry["two_sample"] = {"accuracy": asdict(test.accuracy), **matched, "by_seed": test.by_seed}
            entry["two_sample"] |= {"pairs": len(test.prompts), "training_accuracy": test.fitted}
        if result := verdict.pairwise:
            left_out = ("scores", "prompts")
            entry["pairwise"] = {key: value for key, value in asdict(result).items() if key not in left_out}
        students[name] = entry
    interval = f"{INTERVAL}; of two_sample {WIDENED}"
    whole = {"interval": interval, "settings": settings, "teacher": {"numbers": asdict(teacher)}, "students": students}
    return _without_nan(whole)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Readable, whatever the language."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def check_plotting() -> None:
    """ValueError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: expected matplotlib to be installed, got no such package; pip install matplotlib, or leave it out"
        )


def plot(path: Path, verdicts: Mapping[str, Verdict], teacher: Numbers, against: str) -> None:
    """A panel for each judge, with intervals and the line of a perfect student, and one for lengths, as PNG."""
    from matplotlib.figure import Figure

    tests = {name: v.two_sample.accuracy for name, v in verdicts.items() if v.two_sample}
    rates = {name: v.pairwise.win_rate for name, v in verdicts.items() if v.pairwise and v.pairwise.win_rate.count}
    judged = [(f"told from {against}: accuracy", tests), (f"win rate against {against}", rates)]
    judged = [(title, estimates) for title, estimates in judged if estimates]
    figure = Figure(figsize=(4.2 * (len(judged) + 1), 1.6 + 0.4 * len(verdicts)), layout="constrained")
    axes = figure.subplots(1, len(judged) + 1, squeeze=False)[0]
    for axis, (title, estimates) in zip(axes, judged, strict=False):
        values = [e.value for e in estimates.values()]
        reach = [[e.value - e.low for e in estimates.values()], [e.high - e.value for e in estimates.values()]]
        axis.errorbar(values, list(estimates), xerr=reach, fmt="o", capsize=3)
        axis.axvline(0.5, color="gray", linestyle="--", linewidth=1)
        axis.set(xlim=(-0.02, 1.02), title=title, ylim=(len(estimates) - 0.5, -0.5))
    lengths = {**{name: v.numbers.mean_tokens for name, v in verdicts.items()}, "teacher": teacher.mean_tokens}
    axes[-1].barh(list(lengths), list(lengths.values()), color=["C0"] * len(verdicts) + ["gray"])
    axes[-1].set(title="mean tokens", ylim=(len(lengths) - 0.5, -0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
