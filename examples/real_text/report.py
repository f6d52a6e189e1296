"""The experiment's table, from what the runs and the judge left.

    python -m examples.real_text.report OUT

A row per student and temperature of its answers: training time of its own stage, the two-sample judge's accuracy (0.5:
a perfect student) with its standard deviation over seeds, all pairs and those of like length, and the judge's plain
numbers; then the means of a run's training metrics over its last quarter.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from examples.real_text.plan import RUNS
from verl.utils.console import printable

WATCHED = ("critic/d_acc", "critic/score_diff", "critic/length_reward_corr", "response_length/cut_ratio")


def collect(out: Path) -> list[dict[str, Any]]:
    """One record per seed, run, step and temperature."""
    order = {run.name: number for number, run in enumerate(RUNS)}
    records = []
    for file in out.glob("seed*/judge/*/judge.json"):
        name, step, temperature = file.parent.name.split("@")
        seed = file.parents[2].name.removeprefix("seed")
        home = file.parents[2] / name
        (student,) = json.loads(file.read_text())["students"].values()
        answers = pd.read_parquet(home / f"answers-{step}-at-{temperature}.parquet", columns=["seconds"])
        test, numbers = student["two_sample"], student["numbers"]
        records.append(
            {
                "run": name, "step": int(step), "at": temperature, "seed": seed, "seconds": answers["seconds"].iloc[0],
                "judge": test["accuracy"]["value"],
                "matched": test["lengths_within_0.2"]["value"],
                "rouge": numbers["rouge_l"], "tokens": numbers["mean_tokens"], "ratio": numbers["length_ratio"],
                "cut": numbers["cut"], "loops": numbers["loops"], "distinct": numbers["distinct"][1],
                **_watched(home / "metrics.jsonl", int(step)),
            }
        )  # fmt: skip
    return sorted(records, key=lambda r: (r["at"], order.get(r["run"], len(order)), r["step"], r["seed"]))


def _watched(file: Path, step: int) -> dict[str, float]:
    """Means of training metrics over the last quarter of the steps before `step`."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line["data"] for line in lines if 0.75 * step <= line["step"] < step]
    means = {}
    for name in WATCHED:
        values = [line[name] for line in lines if name in line]
        if values:
            means[name.split("/")[-1]] = float(np.mean(values))
    return means


def render(out: Path) -> str:
    """The table, in Markdown."""
    students = defaultdict(list)
    for record in collect(out):
        students[record["run"], record["step"], record["at"]].append(record)
    head = ("run", "steps", "at", "seeds", "seconds", "judge", "like length", "ROUGE-L", "tokens", "of teacher's",
            "cut", "loops", "distinct-2", "d_acc", "score_diff", "length corr")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for (run, step, temperature), seeds in students.items():
        mean = {key: float(np.mean([r[key] for r in seeds if r.get(key) is not None])) for key in _numeric(seeds)}
        spread = np.std([r["judge"] for r in seeds], ddof=1) if len(seeds) > 1 else float("nan")
        judge = f"{mean['judge']:.3f}" + (f" ± {spread:.3f}" if len(seeds) > 1 else "")
        lines.append(
            (
                run, str(step), temperature, str(len(seeds)), f"{mean['seconds']:.0f}", judge,
                _three(mean.get("matched")), _three(mean["rouge"]), f"{mean['tokens']:.0f}", f"{mean['ratio']:.2f}",
                f"{mean['cut']:.1%}", f"{mean['loops']:.1%}", _three(mean["distinct"]), _three(mean.get("d_acc")),
                _three(mean.get("score_diff")), _three(mean.get("length_reward_corr")),
            )
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _numeric(records: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    return [key for key, value in first.items() if isinstance(value, int | float) and key != "step"]


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    print(printable(render(Path(sys.argv[1]))))
