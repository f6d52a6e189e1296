"""docs/zh/models.md, from the English page, which `python -m verl.tools.families` writes.

The texts are in `models.zh.yaml`. What stands above the table is there beside the English text that it translates;
cells are translated by patterns, and one for which there is none keeps the page from being made.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ENGLISH = Path(__file__).parents[1] / "docs" / "models.md"
TEXTS = Path(__file__).with_name("models.zh.yaml")
NOTE = "<!-- 本页由 python -m docs_site.generate 根据 docs/models.md 生成，译文在 docs_site/models.zh.yaml。 -->"
RULE = "|---|---|---|---|\n"


@cache
def texts() -> dict[str, Any]:
    """`above` the table; patterns of `outcomes` and `reasons` with what they are in Chinese."""
    return yaml.safe_load(TEXTS.read_text(encoding="utf-8"))


def page() -> str:
    """The page in Chinese."""
    _, version, rows = _english()
    lines = [
        [family, *(_chinese(cell, "outcomes") or cell for cell in (policy, score)), _chinese(why, "reasons") or why]
        for family, policy, score, why in rows
    ]
    above = texts()["above"]["zh"].replace("{version}", version)
    return f"{NOTE}\n\n{above}" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def problems() -> list[str]:
    """What keeps the page from being made: a text above the table that has changed, and cells without a translation."""
    above, _, rows = _english()
    found = []
    if above != texts()["above"]["en"]:
        found.append(
            f"docs/models.md: what stands above its table has changed. Revise the Chinese in {TEXTS.name}, then set "
            "`en` to the new text"
        )
    cells = [("outcomes", cell) for row in rows for cell in row[1:3]] + [("reasons", row[3]) for row in rows]
    missing = [(kind, cell) for kind, cell in dict.fromkeys(cells) if _chinese(cell, kind) is None]
    return found + [f"docs/models.md: no Chinese in {TEXTS.name}, {kind}, for: {cell}" for kind, cell in missing]


def _english() -> tuple[str, str, list[list[str]]]:
    """The English page's text above the table, with {version}; the version; and the rows' cells."""
    above, rule, table = ENGLISH.read_text(encoding="utf-8").partition(RULE)
    version = re.search(r"transformers (\d\S*)", above)[1]
    rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()]
    return above.replace(version, "{version}") + rule, version, rows


def _chinese(text: str, kind: str) -> str | None:
    """A cell's text in Chinese, and so on with the last part of it, which may be a sentence of ours; None of one that
    no pattern knows."""
    if not text:
        return ""
    for pattern, chinese in texts()[kind].items():
        found = re.fullmatch(pattern, text)
        if found and pattern.endswith("(.*)"):
            last = found[found.re.groups]
            return found.expand(chinese).removesuffix(last) + (_chinese(last, kind) or last)
        if found:
            return found.expand(chinese)
    return None
