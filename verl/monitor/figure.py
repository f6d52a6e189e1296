"""A run at a glance: training_progress.png, one picture that can be sent to others.

In English, since the fonts that matplotlib brings have no Chinese characters; a run's name in Chinese is shown where
the machine has a font for it, and as question marks elsewhere.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from verl.monitor.series import Run
from verl.monitor.watch import Alarm, Watch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "training_progress.png"
CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
)


@dataclass(frozen=True)
class Panel:
    """Metrics on one pair of axes, by the names that rules use; `band` is the healthy range, shaded green."""

    title: str
    metrics: tuple[str, ...]
    band: tuple[float, float] | None = None
    log: bool = False


PANELS = (
    Panel("discriminator accuracy", ("critic/d_acc", "val/critic/d_acc", "val/critic/fixed/d_acc"), band=(0.55, 0.8)),
    Panel("teacher's score less student's", ("critic/score_diff",)),
    Panel("scores", ("critic/teacher_score_mean", "critic/student_score_mean")),
    Panel("gradient norms", ("actor/grad_norm", "critic/grad_norm"), log=True),
    Panel("tokens of an answer", ("response_length/mean", "response_length/max", "val/response_length/mean")),
    Panel("share of answers cut", ("response_length/clip_ratio", "response_length/cut_ratio"), band=(0.0, 0.3)),
    Panel("losses", ("critic/ranking_loss", "actor/sft_loss", "actor/soda_loss", "val/sft_loss")),
    Panel("likeness to the teacher", ("val/rouge-L/mean", "train/rouge-L/mean")),
    Panel("entropy of the student", ("actor/entropy",)),
)


def check_plotting() -> None:
    """ValueError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot: expected matplotlib to be installed, got no such package; pip install matplotlib, or leave it out"
        )


def plot(run: Run, watch: Watch, verdict: str, path: Path) -> None:
    """Draw the panels that the run has metrics for, with the verdict (in English) above and alarms shaded red.

    Raises:
        ValueError: it has none of the metrics.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    series = {name: watch.series(run, name) for panel in PANELS for name in panel.metrics}
    panels = [panel for panel in PANELS if any(series[name].values for name in panel.metrics)]
    if not panels:
        raise ValueError(
            f"--plot: expected metrics such as critic/d_acc or actor/sft_loss, got none of those in {run.name}"
        )
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        lines = {name: series[name].finite() for name in panel.metrics}
        draw(axis, panel, {name: line for name, line in lines.items() if line[0]}, watch.alarms, watch.step)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    title, fonts = _shown(f"{run.name}: {verdict}")
    # No formula, which matplotlib would read between two dollar signs.
    figure.suptitle(textwrap.fill(title, 130), fontsize=9, family=fonts, parse_math=False)
    figure.savefig(path, dpi=130, format="png")


def draw(
    axis: Axes, panel: Panel, lines: dict[str, tuple[list[int], list[float]]], alarms: list[Alarm], last_step: int
) -> None:
    """One panel: its lines over the steps, its healthy band, and the alarms about its metrics."""
    for name, (steps, values) in lines.items():
        axis.plot(steps, values, label=name, linewidth=1.2, marker="o" if len(steps) < 25 else None, markersize=2.5)
    if panel.band is not None:
        axis.axhspan(*panel.band, color="green", alpha=0.07)
    for alarm in alarms:
        if not alarm.is_note and set(alarm.rule.value.metrics) & set(panel.metrics):
            end = last_step if alarm.until is None else alarm.until
            axis.axvspan(alarm.since, max(end, alarm.since + 1), color="red", alpha=0.12)
            axis.annotate(
                alarm.rule.id, (alarm.since, 0.03), xycoords=("data", "axes fraction"), fontsize=6, color="red"
            )
    if panel.log and all(value > 0 for _, values in lines.values() for value in values):
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel("step", fontsize=7)
    axis.tick_params(which="both", labelsize=7)
    if lines:
        axis.legend(fontsize=6.5, loc="best")


def _shown(text: str) -> tuple[str, list[str]]:
    """The text as the machine's fonts can show it, with question marks for what they cannot, and the fonts."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [font for font in CHINESE_FONTS if font in there]
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return (text if fonts else text.encode("ascii", "replace").decode(), ["DejaVu Sans", *fonts])
