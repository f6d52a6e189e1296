"""Rows that are much longer or shorter than the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from verl.data_tools.check.findings import Finding

# Quarters of the rows' spans beyond the middle half, of the logarithms: lengths are spread over orders of magnitude.
_FENCES = 3.0
# In logarithms: nothing is an outlier that is less than three times as long or short as the middle half's end.
_LEAST = math.log(3)
_FEWEST_ROWS = 20


class Spread(NamedTuple):
    """How long prompts or answers are: of the sorted lengths, the least, three in between, and the largest."""

    least: int
    low: int
    median: int
    high: int
    most: int


def spread_of(lengths: Sequence[int]) -> Spread:
    """Least, quarter, half, three quarters and most of lengths, of which there is one."""
    ordered = sorted(lengths)
    return Spread(*(ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)))


def find_outliers(lengths: Sequence[tuple[int, int] | None], unit: str) -> Iterator[Finding]:
    """Rows whose prompt or answer is out of the line.

    Args:
        lengths: of each row's prompt and answer; None where there is no row.
        unit: what they are counted in, for messages.
    """
    for side, name in enumerate(("the prompt", "the answer")):
        there = [(number, pair[side]) for number, pair in enumerate(lengths) if pair is not None]
        if len(there) < _FEWEST_ROWS:
            continue
        spread = spread_of([length for _, length in there])
        low, high = math.log(max(1, spread.low)), math.log(max(1, spread.high))
        width = max(_FENCES * (high - low), _LEAST)
        for number, length in there:
            size = math.log(max(1, length))
            kind = "long" if size > high + width else "short" if size < low - width else None
            if kind:
                shown = f"{length:,} {unit}; of half of the rows {spread.low:,} to {spread.high:,}"
                yield Finding(kind, number, name, shown)
