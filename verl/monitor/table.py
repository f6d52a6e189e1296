"""The rules as a Markdown table: that of docs/monitor.md, by `python -m verl.monitor.table [--lang zh]`."""

from __future__ import annotations

import argparse

from verl.monitor.rules import Language, Rule, Rules, load_rules
from verl.monitor.verdict import shown_range

BEGIN = {
    "en": "<!-- rules: python -m verl.monitor.table -->",
    "zh": "<!-- rules: python -m verl.monitor.table --lang zh -->",
}
END = "<!-- end of rules -->"
HEAD = {
    "en": ("rule", "value", "healthy", "fires after", "says", "causes and what to turn, in order"),
    "zh": ("规则", "取值", "健康范围", "触发条件", "含义", "原因与应调整的配置项（按顺序）"),
}
AFTER = {"en": "{steps} in a row", "zh": "连续 {steps} 次"}
NOTE = {"en": " (note)", "zh": "（提示）"}
# What stands between words: of a list, of ranges, before what is said of something, and around an aside.
COMMA, SEMICOLON, COLON = {"en": ", ", "zh": "、"}, {"en": "; ", "zh": "；"}, {"en": ": ", "zh": "："}
ASIDE = {"en": " ({})", "zh": "（{}）"}


def markdown(rules: Rules, language: Language = "en") -> str:
    """A row per rule, in order."""
    lines = [_row(HEAD[language]), _row(["---"] * len(HEAD[language]))]
    return "\n".join([*lines, *(_row(_cells(rule, language)) for rule in rules.rules)])


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _cells(rule: Rule, language: Language) -> list[str]:
    ranges: dict[str, list[str]] = {}
    for stage, healthy in rule.healthy.items():
        ranges.setdefault(shown_range(healthy, language), []).append(stage)
    everywhere = len(ranges) == 1 and len(rule.healthy) == 5
    shown = [
        text if everywhere else COMMA[language].join(stages) + COLON[language] + text for text, stages in ranges.items()
    ]
    causes = [
        cause.text.text(language)
        + (f"{COLON[language]}`{cause.knob}`" if cause.knob else "")
        + (ASIDE[language].format(cause.turn.text(language)) if cause.turn else "")
        for cause in rule.causes
    ]
    name = f"`{rule.id}`" + ("" if rule.severity == "alarm" else NOTE[language])
    numbered = " ".join(f"{number}. {cause}" for number, cause in enumerate(causes, start=1))
    return [
        name,
        rule.label.text(language),
        SEMICOLON[language].join(shown),
        AFTER[language].format(steps=rule.for_),
        rule.says.text(language),
        numbered,
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m verl.monitor.table", description=__doc__)
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="the table's language (default: en)")
    print(markdown(load_rules(), parser.parse_args().lang))


if __name__ == "__main__":
    main()
