"""The table and the plots of the grammar world's experiment, from the results that `run.py` left.

    python -m examples.grammar_world.report --results outputs/grammar_world --out docs/images

prints a Markdown table, mean and standard deviation over seeds, and draws PNG files. Nothing is chosen by its result:
every run of the plan is shown with its last student, and SeqKD at the same compute with its best as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.grammar_world.plan import COST_OF_GAD, COST_OF_WARMUP, RUNS, Run

SHOWN = ("grammatical", "factual", "correct", "answer_coverage", "fact_set_coverage", "forward_kl", "js", "length")
BY_NAME = {run.name: run for run in RUNS}


@dataclass(frozen=True)
class Result:
    """One run of one seed: its measures by step, and its training metrics by step."""

    run: Run
    curve: dict[int, dict[str, float]]
    metrics: dict[int, dict[str, float]]


def load(results: Path) -> dict[str, list[Result]]:
    """What there is, by name, a list over seeds."""
    loaded: dict[str, list[Result]] = {}
    for run in RUNS:
        for file in sorted(results.glob(f"seed*/{run.name}/result.json")):
            curve = {entry["step"]: entry for entry in json.loads(file.read_text())["curve"]}
            lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
            result = Result(run, curve, {line["step"]: line["data"] for line in lines})
            loaded.setdefault(run.name, []).append(result)
    return loaded


def cost(run: Run, step: int) -> float:
    """Forwards and backwards up to `step` and of the runs before it, in SeqKD steps."""
    before = cost(BY_NAME[run.actor], BY_NAME[run.actor].steps) if run.actor != "base" else 0.0
    per_step = 1.0
    if run.critic is not None:
        per_step = COST_OF_GAD if run.name.startswith("GAD") else COST_OF_WARMUP + (run.actor == "base")
    return before + per_step * step


def _row(name: str, students: list[dict[str, float]]) -> str:
    cells = []
    for measure in SHOWN:
        values = np.array([student[measure] for student in students])
        digits = 1 if measure == "length" else 3
        cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
    return f"| {name} | {' | '.join(cells)} |"


def table(results: dict[str, list[Result]]) -> str:
    """Markdown: one row per run, its last student; the base first, and SeqKD's best student by each seed's JS."""
    lines = [f"| run | {' | '.join(SHOWN)} |", "|" + "---|" * (len(SHOWN) + 1)]
    lines.append(_row("base", [result.curve[0] for result in results["SeqKD"]]))
    for name, of_seeds in results.items():
        students = [result.curve[max(result.curve)] for result in of_seeds if result.curve]
        if students:
            lines.append(_row(name, students))
        if name == "SeqKD-long":
            best = [min(result.curve.values(), key=lambda student: student["js"]) for result in of_seeds]
            lines.append(_row("SeqKD-long, best JS", best))
    teacher = results["SeqKD"][0].curve[0]["teacher_length"]
    return "\n".join([*lines, f"\nThe teacher's own length is {teacher:.1f} tokens."])


def _mean_curve(of_seeds: list[Result], value: Callable[[Result, int], float]) -> tuple[list[int], np.ndarray]:
    steps = sorted(of_seeds[0].curve)
    return steps, np.array([[value(result, step) for result in of_seeds] for step in steps]).mean(-1)


def draw_compute(results: dict[str, list[Result]], file: Path) -> None:
    """Correctness and JS divergence against compute, from SeqKD's student: SeqKD going on, and GAD with each loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    for name, of_seeds in results.items():
        if name != "SeqKD-long" and not (name.startswith("GAD-frozen") and name.endswith("fresh")):
            continue
        for axis, measure in zip(axes, ("correct", "js"), strict=True):
            steps, values = _mean_curve(of_seeds, lambda result, step, m=measure: result.curve[step][m])
            start = np.mean([result.curve[result.run.steps][measure] for result in results["SeqKD"]])
            before = BY_NAME["SeqKD"].steps if name == "SeqKD-long" else cost(of_seeds[0].run, 0)
            x, values = [before, *(cost(of_seeds[0].run, step) for step in steps)], [start, *values]
            style = {"color": "black", "linewidth": 2} if name == "SeqKD-long" else {"marker": "o", "markersize": 3}
            axis.plot(x, values, label=name.replace("-frozen", "").replace("-fresh", ""), **style)
    for axis, title in zip(axes, ("correct answers", "JS divergence from the teacher (nats)"), strict=True):
        axis.set(xscale="log", xlabel="compute, in SeqKD steps", title=title)
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_accuracy(results: dict[str, list[Result]], names: list[str], file: Path) -> None:
    """The discriminator's accuracy on training prompts and on held-out ones, fresh and fixed answers, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in names if name in results]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True, constrained_layout=True)
    kinds = {"critic/d_acc": "training prompts", "val/critic/d_acc": "held-out prompts, fresh answers",
             "val/critic/fixed/d_acc": "held-out prompts, fixed answers"}  # fmt: skip
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for metric, label in kinds.items():
            steps = sorted(step for step, data in results[name][0].metrics.items() if metric in data)
            values = np.array([[r.metrics[s][metric] for r in results[name]] for s in steps]).mean(-1)
            if metric == "critic/d_acc":
                values = np.convolve(np.pad(values, 5, mode="edge"), np.ones(11) / 11, mode="valid")
            axis.plot(steps, values, label=label)
        axis.axhline(0.5, color="grey", linewidth=0.5)
        axis.set(title=name, xlabel="step", ylim=(0.3, 1.0))
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("accuracy of the discriminator")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("outputs/grammar_world"), help="what run.py wrote to")
    parser.add_argument("--out", type=Path, default=Path("outputs/grammar_world"), help="folder of the plots")
    options = parser.parse_args()
    results = load(options.results)
    if "SeqKD" not in results:
        parser.error(f"{options.results} has no finished SeqKD run: start examples.grammar_world.run first")
    options.out.mkdir(parents=True, exist_ok=True)
    print(table(results))
    draw_compute(results, options.out / "grammar_world_compute.png")
    accuracy = ["GAD-frozen-bradley_terry-last_token-fresh", "GAD-frozen-ranking-mean-fresh", "GAD-few-rows"]
    draw_accuracy(results, accuracy, options.out / "grammar_world_accuracy.png")
    print(f"plots: {options.out}/grammar_world_*.png")


if __name__ == "__main__":
    main()
