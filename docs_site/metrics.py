"""docs/reference/metrics.md: all that a run can log, in both languages, from the catalogue in `metrics.yaml`."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from verl.monitor.rules import load_rules

CATALOGUE = Path(__file__).with_name("metrics.yaml")
STAGES = ("seqkd", "warmup", "gad", "soda")
TITLES = {
    "actor": ("The student's update", "学生的更新"),
    "soda": ("SODA", "SODA"),
    "discriminator": ("The discriminator", "判别器"),
    "rewards": ("Rewards and advantages", "奖励与优势"),
    "lengths": ("Lengths", "长度"),
    "validation": ("Validation", "验证"),
    "held_out": ("The discriminator on held-out prompts", "判别器在留出提示词上"),
    "sync": ("Engine and progress", "引擎与进度"),
    "time": ("Time", "时间"),
    "performance": ("Speed and memory", "速度与内存"),
}
TEXTS = {
    "en": {
        "title": "Metrics",
        "intro": (
            "Every name that a run can log, with the stages that log it: to `metrics.jsonl`, and to each of "
            "`trainer.logger`. A metric that its settings switch off, or that a step has not measured, is absent. "
            "A discriminator loss from a file of your own adds the names that it returns. Units and ranges are in "
            "italics. The health monitor's rules on a metric are named behind it; [The health monitor](../monitor.md) "
            "has what is healthy, and what to turn."
        ),
        "head": ("metric", "stages", "what it says"),
        "rules": " Rules: {0}.",
        "unit": "*{0}*. ",
        "all": "all",
        "made": "Made from `docs_site/metrics.yaml` by `python -m docs_site.generate`: change it there.",
    },
    "zh": {
        "title": "指标",
        "intro": (
            "一次运行可能记录的全部指标名，以及记录它的阶段：写入 `metrics.jsonl`，"
            "也写入 `trainer.logger` 列出的每个工具。"
            "被配置关闭的，或该步没有测量的指标不会出现。来自用户文件的判别器损失会另外加入它自己返回的名字。"
            "斜体为单位与取值范围。健康监控对某个指标的规则列在其后；何为健康、该调什么，见[健康监控](../monitor.md)。"
        ),
        "head": ("指标", "阶段", "含义"),
        "rules": "规则：{0}。",
        "unit": "*{0}*。",
        "all": "全部",
        "made": "本页由 `python -m docs_site.generate` 根据 `docs_site/metrics.yaml` 生成，请在那里修改。",
    },
}


@cache
def catalogue() -> list[dict[str, Any]]:
    """The sections of the catalogue, as written."""
    return yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))


def names_of(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def names(stage: str | None = None) -> set[str]:
    """All names, or those that a stage can log."""
    return {
        name
        for section in catalogue()
        for metric in section["metrics"]
        if stage is None or stage in _stages(metric)
        for name in names_of(metric["name"])
    }


def problems() -> list[str]:
    """What is wrong with the catalogue itself: names that stand there twice, entries that lack something."""
    found, seen = [], set()
    for section in catalogue():
        if section["section"] not in TITLES:
            found.append(f"{section['section']}: a section without a title")
        for metric in section["metrics"]:
            if metric.keys() != {"name", "stages", "unit", "en", "zh"} or metric["unit"].keys() != {"en", "zh"}:
                found.append(f"{metric['name']}: an entry has name, stages, unit, en and zh, and a unit en and zh")
            if set(_stages(metric)) - set(STAGES):
                found.append(f"{metric['name']}: stages are {', '.join(STAGES)}, or all")
            for name in names_of(metric["name"]):
                if name in seen:
                    found.append(f"{name} stands there twice")
                seen.add(name)
    return found


def _stages(metric: dict[str, Any]) -> list[str]:
    return list(STAGES) if metric["stages"] == "all" else metric["stages"]


def page(language: str) -> str:
    """The whole page."""
    texts = TEXTS[language]
    lines = [f"<!-- {texts['made'].replace('`', '')} -->", "", f"# {texts['title']}", "", texts["intro"]]
    for section in catalogue():
        title = TITLES[section["section"]][language == "zh"]
        lines += ["", f"## {title}", "", section[language], "", _row(texts["head"]), _row(["---"] * 3)]
        lines += [_row(_cells(metric, language)) for metric in section["metrics"]]
    return "\n".join([*lines, "", texts["made"], ""])


def _row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(metric: dict[str, Any], language: str) -> list[str]:
    texts = TEXTS[language]
    stages = texts["all"] if metric["stages"] == "all" else ", ".join(metric["stages"])
    rules = sorted({rule for name in names_of(metric["name"]) for rule in _rules().get(name, [])})
    return [
        " ".join(f"`{shown}`" for shown in _shown(metric["name"])),
        stages,
        texts["unit"].format(metric["unit"][language])
        + metric[language]
        + (texts["rules"].format(", ".join(f"`{rule}`" for rule in rules)) if rules else ""),
    ]


def _shown(pattern: str) -> list[str]:
    """A pattern of few names as these; of many, as itself, which breaks into lines at its commas."""
    found = names_of(pattern)
    return found if len(found) <= 3 else [pattern] if len(pattern) < 90 else found


@cache
def _rules() -> dict[str, list[str]]:
    """The monitor's rules by the metrics that they read."""
    found: dict[str, list[str]] = {}
    for rule in load_rules().rules:
        for name in rule.value.metrics:
            found.setdefault(name, []).append(rule.id)
    return found
