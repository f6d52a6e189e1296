"""Texts as the small units that linear models count."""

from __future__ import annotations

import re
from itertools import pairwise

# Chinese, Japanese and Korean character by character, other words whole; punctuation and white space count too.
ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+|[^\w\s]|\n| +")
_RUN = re.compile(rf"[{ALONE}]+|[^\W\d_{ALONE}]{{2,}}")
_ALONE = re.compile(f"[{ALONE}]")
PAIR = "\0"


def units(text: str) -> list[str]:
    """Words and signs, and pairs of neighbours among them."""
    words = WORD.findall(text)
    return words + [f"{left}{PAIR}{right}" for left, right in pairwise(words)]


def terms(text: str) -> list[str]:
    """What a text is about: lower-cased words of two letters or more; in Chinese, Japanese and Korean, which have no
    spaces, every two neighbouring characters."""
    found = []
    for run in _RUN.findall(text.lower()):
        if _ALONE.match(run):
            found += [run[at : at + 2] for at in range(max(1, len(run) - 1))]
        else:
            found.append(run)
    return found


def shown(unit: str) -> str:
    """A unit as it is printed: without the spaces around it, and other white space by signs."""
    joined = unit.replace(PAIR, "")
    return (joined.strip(" ") or joined).replace("\n", "⏎").replace(" ", "␣")
