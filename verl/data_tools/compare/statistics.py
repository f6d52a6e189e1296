"""Differences between two samples with intervals and tests: pure functions of arrays. A values, B values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy import stats

from verl.tools.judge.statistics import CONFIDENCE

ALPHA = 1 - CONFIDENCE
_Z = NormalDist().inv_cdf(1 - ALPHA / 2)


class Interval(NamedTuple):
    """A number and its interval at CONFIDENCE."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One thing in which two sets were compared.

    aspect: what. effect: from 0 (alike) to 1: a share of either set, at least, that has no like in the other; so what
    different tests find can be ranked. p: how likely so much is where both are drawn alike. says: a sentence.
    """

    aspect: str
    effect: float
    p: float
    says: str


def share(count: int, total: int) -> Interval:
    """A share with Wilson's interval (Wilson 1927, JASA 22): (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) /
    (1 + z^2 / n)."""
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    p, z2 = count / total, _Z**2
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    reach = _Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Of none and of all, exactly so: rounding would leave a trace.
    return Interval(p, middle - reach if count else 0.0, middle + reach if count < total else 1.0)


def difference_of_shares(a: tuple[int, int], b: tuple[int, int]) -> Interval:
    """B's share less A's, each a (count, total), with Newcombe's interval of two Wilson ones (Newcombe 1998, Statistics
    in Medicine 17, method 10)."""
    first, second = share(*a), share(*b)
    difference = second.value - first.value
    below = math.hypot(second.value - second.low, first.high - first.value)
    above = math.hypot(second.high - second.value, first.value - first.low)
    return Interval(difference, difference - below, difference + above)


def p_of_shares(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Fisher's exact test of two (count, total)."""
    return float(stats.fisher_exact([[a[0], a[1] - a[0]], [b[0], b[1] - b[0]]]).pvalue)


def difference_of_means(a: np.ndarray, b: np.ndarray) -> Interval:
    """B's mean less A's, with Welch's interval."""
    difference = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2:
        return Interval(difference, -math.inf, math.inf)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(parts))
    if not error:
        return Interval(difference, difference, difference)
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    return Interval(difference, difference - reach, difference + reach)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The largest distance between the two cumulative distributions, and its p; ties make that larger than it is."""
    result = stats.ks_2samp(a, b, method="asymp")
    return float(result.statistic), float(result.pvalue)


def p_of_accuracy(accuracy: float, rows: int, widening: float) -> float:
    """How likely coins are right so often: the exact binomial test, above 1/2, with so many rows fewer as makes its
    standard error wider by `widening`."""
    counted = max(1, round(rows / widening**2))
    return float(stats.binom.sf(math.ceil(accuracy * counted - 1e-9) - 1, counted, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Of several tests at once: p adjusted so that one below alpha is false with a chance of at most alpha (Holm 1979,
    Scandinavian Journal of Statistics 6)."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted
