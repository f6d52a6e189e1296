"""How answers are written: markdown, lists, code, sentences. Pure functions of a text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from verl.data_tools.compare.statistics import (
    Finding,
    Interval,
    difference_of_means,
    difference_of_shares,
    kolmogorov_smirnov,
    p_of_shares,
)
from verl.utils.rouge import tokenize

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^ {0,3}#{1,6} +\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*|__[^\s_](?:[^_\n]*[^\s_])?__")
_BULLET = re.compile(r"^[ \t]*[-*+•·][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(?:\d{1,3}[.)、]|[(（]\d{1,3}[)）])[ \t]*\S", re.MULTILINE)
_TABLE = re.compile(r"^[ \t]*\|?[ \t]*:?-{3,}:?[ \t]*\|", re.MULTILINE)
# A full stop ends a sentence before white space or the text's end; a Chinese one wherever it stands.
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)\]]|$)|[。！？]+|\n+")


def code_share(text: str) -> float:
    """The share of the characters that are within ``` fences, the fences included."""
    return sum(match.end() - match.start() for match in _FENCE.finditer(text)) / len(text) if text else 0.0


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence outside of code; a line's end ends one too."""
    return [words for part in _SENTENCE_END.split(_FENCE.sub("\n", text)) if (words := len(tokenize(part)))]


def mean_sentence(text: str) -> float:
    """Words of a sentence on average; 0 without one."""
    lengths = sentence_lengths(text)
    return sum(lengths) / len(lengths) if lengths else 0.0


def _without_code(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(_FENCE.sub("\n", text)) is not None


# What an answer has or has not, and what can be counted of it.
HAS: dict[str, Callable[[str], bool]] = {
    "a heading": _without_code(_HEADING),
    "bold text": _without_code(_BOLD),
    "a bullet list": _without_code(_BULLET),
    "a numbered list": _without_code(_NUMBERED),
    "a table": _without_code(_TABLE),
    "a code block": lambda text: _FENCE.search(text) is not None,
    "a question mark": lambda text: "?" in text or "？" in text,
    "an exclamation mark": lambda text: "!" in text or "！" in text,
    "punctuation at its end": lambda text: (
        text.rstrip().rstrip("\"'”’)]）」").endswith(tuple(".!?。！？")) or text.rstrip().endswith("```")
    ),
}
COUNTED: dict[str, Callable[[str], float]] = {
    "words of a sentence": mean_sentence,
    "sentences": lambda text: len(sentence_lengths(text)),
    "lines": lambda text: text.strip().count("\n") + 1,
    "share that is code": code_share,
}


@dataclass(frozen=True)
class Style:
    """One number of answers: A's and B's mean or share, and B's less A's. effect and p as in `Finding`."""

    name: str
    is_share: bool
    a: float
    b: float
    difference: Interval
    effect: float
    p: float


def compare_styles(a: Sequence[str], b: Sequence[str]) -> list[Style]:
    """All numbers of A's answers and of B's."""
    found = []
    for name, has in HAS.items():
        counts = [(sum(map(has, texts)), len(texts)) for texts in (a, b)]
        difference = difference_of_shares(*counts)
        shares = [count / total for count, total in counts]
        found.append(Style(name, True, *shares, difference, abs(difference.value), p_of_shares(*counts)))
    for name, count in COUNTED.items():
        values = [np.array([count(text) for text in texts], dtype=float) for texts in (a, b)]
        distance, p = kolmogorov_smirnov(*values)
        means = [float(side.mean()) for side in values]
        found.append(Style(name, False, *means, difference_of_means(*values), distance, p))
    return found


def finding(style: Style, names: tuple[str, str]) -> Finding:
    """In words."""
    if style.is_share:
        says = f"answers with {style.name} are {style.a:.0%} of {names[0]} and {style.b:.0%} of {names[1]}"
    elif style.name == "share that is code":
        says = f"{style.a:.0%} of an answer's characters are code in {names[0]} and {style.b:.0%} in {names[1]}"
    else:
        says = f"answers have {style.a:.1f} {style.name} in {names[0]} and {style.b:.1f} in {names[1]}"
    return Finding(f"style of answers: {style.name}", style.effect, style.p, says)
