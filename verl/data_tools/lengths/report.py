"""What was measured and what is advised: as text, as JSON, and as a chart."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from verl.data_tools.lengths.advice import Advice, in_one_command, in_words
from verl.data_tools.lengths.limits import PERCENTS, Limits, histogram, summarise
from verl.data_tools.lengths.measure import Lengths, faults_in_words
from verl.data_tools.writing import write_whole
from verl.utils.console import table

BAR = 40
# Of the printed commands.
FOR_THE_USER = ("MODEL", "CRITIC", "TRAIN", "VAL", "NAME")


def sides(lengths: Lengths) -> dict[str, np.ndarray]:
    """What is counted, by name."""
    return {"prompt": lengths.prompts, "answer": lengths.answers, "both": lengths.whole}


def numbers_table(lengths: Lengths) -> str:
    """A row for prompts, answers and both."""
    rows = [["tokens", "rows", "mean", *(f"{percent:g}%" for percent in PERCENTS), "max"]]
    for name, values in sides(lengths).items():
        summary = summarise(values)
        rows.append([name, f"{summary.count}", f"{summary.mean:.1f}", *map(str, summary.percentiles.values())])
        rows[-1].append(str(summary.longest))
    return table(rows)


def bars(name: str, lengths: np.ndarray) -> str:
    """A histogram of letters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        "█".encode(encoding)
        mark = "█"
    except UnicodeEncodeError:
        mark = "#"
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    rows = []
    for low, high, count in bins:
        length = -(-count * BAR // most) if count else 0
        rows.append([f"{low}-{high}", f"{count}", f"{count / len(lengths):.1%}", mark * length])
    lines = table([[*row[:3], ""] for row in rows], left=0).split("\n")
    return "\n".join(
        [f"tokens of {name}", *(f"{line}  {row[3]}".rstrip() for line, row in zip(lines, rows, strict=True))]
    )


def render(lengths: Lengths, source: str, advices: Sequence[Advice]) -> str:
    """The whole report."""
    parts = [source]
    if lengths.left_out:
        left_out = sum(lengths.left_out.values())
        parts.append(f"left out {left_out} of {lengths.looked_at} rows: {faults_in_words(lengths.left_out)}")
    parts.append(numbers_table(lengths))
    parts += [bars("prompts", lengths.prompts), bars("answers (EOS included)", lengths.answers)]
    shared = in_words(advices[0])
    parts.append(f"{_title(advices[0])}, {advices[0].steps} steps\n{_reasons(shared)}\n  {advices[0].command}")
    for advice in advices[1:]:
        own = [entry for entry in in_words(advice) if entry not in shared]
        parts.append(f"{_title(advice)}, {advice.steps} steps; other than above:\n{_reasons(own)}\n  {advice.command}")
    commands = [advice.command for advice in advices]
    if (command := in_one_command(advices)) is not None:
        parts.append(f"all in one command:\n  {command}")
        commands.append(command)
    *names, last = [name for name in FOR_THE_USER if any(name in line.split() for line in commands)]
    yours = f"{', '.join(names)} and {last} are yours to fill in"
    parts.append(f"{yours}; what follows --nnodes 1 goes behind that script.")
    return "\n\n".join(parts)


def _title(advice: Advice) -> str:
    return f"{advice.stage} (stage={advice.stage})"


def _reasons(entries: Sequence[Sequence[str]]) -> str:
    lines = []
    for setting, reason in entries:
        lines += [f"  {setting}", *textwrap.wrap(reason, 110, initial_indent="      ", subsequent_indent="      ")]
    return "\n".join(lines)


def to_json(lengths: Lengths, limits: Limits, advices: Sequence[Advice], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers, and the lines."""
    return {
        "settings": dict(settings),
        "rows": {"looked_at": lengths.looked_at, "left_out": dict(lengths.left_out)},
        "tokens": {
            name: {**asdict(summarise(values)), "histogram": histogram(values)}
            for name, values in sides(lengths).items()
        },
        "limits": asdict(limits),
        "stages": {
            advice.stage: {
                "overrides": advice.settings, "line": advice.line, "steps": advice.steps, "reasons": advice.reasons
            }
            for advice in advices
        },
    }  # fmt: skip


def write_chart(path: str, lengths: Lengths, limits: Limits) -> None:
    """A histogram of each side with its limit, and the share of rows up to each length, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    shown = {"prompt": limits.prompt, "answer": limits.answer, "both": limits.together}
    for axis, (name, values) in zip(figure.subplots(1, 3), sides(lengths).items(), strict=True):
        limit, top = shown[name], max(shown[name], int(np.percentile(values, 99.5, method="inverted_cdf")))
        axis.hist(np.minimum(values, top), bins=50, range=(0, top), color="C0", alpha=0.7)
        axis.axvline(limit, color="C3", label=f"limit {limit}: {(values <= limit).mean():.2%} fit")
        for percent in (50, 99):
            at = int(np.percentile(values, percent, method="inverted_cdf"))
            axis.axvline(at, color="gray", linestyle=":" if percent == 50 else "--", label=f"{percent}%: {at}")
        axis.set(
            title=f"tokens of {'prompt and answer' if name == 'both' else f'the {name}'}",
            ylabel="rows",
            xlabel="tokens; the last bar: longer ones",
        )
        axis.legend(fontsize="small")
    write_whole(path, lambda file: _save(figure, file))


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=130, format="png")
