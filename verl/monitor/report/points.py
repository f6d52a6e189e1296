"""Fewer points for a drawing, with nothing that stands out lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from verl.monitor.series import Series

DIGITS = 5


def rounded(value: float | None) -> float | None:
    """To five significant digits, a whole number as such; None for what is no finite number, which JSON has not."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def fewer(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` values (4 or more), ascending. Of each of as many equal parts as fit, the smallest and
    the largest stay (min/max decimation), and of the whole the first and the last."""
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    parts = (most - 2) // 2
    for part in range(parts):
        places = range(part * count // parts, (part + 1) * count // parts)
        numbers = [place for place in places if math.isfinite(values[place])]
        if numbers:
            kept |= {min(numbers, key=values.__getitem__), max(numbers, key=values.__getitem__)}
    return sorted(kept)


def points(series: Series, most: int) -> list[list[float | None]]:
    """[steps, values] for a drawing."""
    kept = fewer(series.values, most)
    return [[series.steps[place] for place in kept], [rounded(series.values[place]) for place in kept]]
