"""Means with confidence intervals where several values belong to one prompt. Pure functions of arrays.

Answers to one prompt are alike, so prompts, not answers, are the independent draws: intervals are clustered by prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
# What cross-validation adds to the standard error that the spread over prompts shows. Each prompt is tested by a model
# that the others trained, and trains the model that tests those, so every two prompts meet twice: where nothing is to
# be learned, the accuracy's variance is about twice the sum of the prompts' own, and no estimator sees that (Bengio &
# Grandvalet 2004, JMLR 5). In simulations (linear judges, 100 to 300 prompts, 5 folds, 3 seeds) the interval without it
# holds the truth 82% to 93% of the times, with it 95% to 98%; with one seed, 96% to 99%.
CROSS_VALIDATED = math.sqrt(2)


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval. `count` values in `clusters` prompts; all three numbers are nan where there is none."""

    value: float
    low: float
    high: float
    count: int
    clusters: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0, 0)


def t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t with `degrees` >= 1 of freedom.

    Exact for 1 and 2; beyond, the expansion around the normal quantile (Abramowitz & Stegun, 26.7.5), which is short of
    the true value by 2e-3 at 3 degrees, p = 0.975, and by less for more.
    """
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    x = NormalDist().inv_cdf(p)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def clustered_mean(
    values: np.ndarray,
    clusters: np.ndarray,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    widening: float = 1.0,
) -> Estimate:
    """The mean of all values (V,) with a t-interval over clusters (V,), at CONFIDENCE.

    With C clusters and e_c the sum of (value - mean) in one, the standard error is sqrt(C / (C - 1) * sum e_c^2) / V,
    the linearised error of a ratio mean (Cochran 1977, Sampling Techniques, 9.A); with equally many values in each it
    is that of the mean of the clusters' means. Degrees of freedom: C - 1.

    Args:
        bounds: of the quantity; the interval is cut to them. Where every value sits on a bound there is no spread to
            go by: the other end is the exact binomial one of C clusters (Clopper & Pearson 1934).
        widening: times the standard error; CROSS_VALIDATED for outcomes of cross-validation.
    """
    if not len(values):
        return NOTHING
    _, member = np.unique(clusters, return_inverse=True)
    count, total = len(values), int(member.max()) + 1
    mean = float(np.mean(values))
    low, high = bounds or (-math.inf, math.inf)
    if total == 1:
        return Estimate(mean, low, high, count, total)
    if bounds and mean in bounds:
        reach = (high - low) * (1 - ((1 - CONFIDENCE) / 2) ** (1 / total))
        return Estimate(mean, max(low, mean - reach), min(high, mean + reach), count, total)
    residuals = np.bincount(member, weights=values - mean)
    error = math.sqrt(total / (total - 1) * float(residuals @ residuals)) / count
    reach = t_quantile((1 + CONFIDENCE) / 2, total - 1) * error * widening
    return Estimate(mean, max(low, mean - reach), min(high, mean + reach), count, total)


def cluster_means(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The clusters there are, ascending (C,), and the mean of each (C,)."""
    names, member = np.unique(clusters, return_inverse=True)
    return names, np.bincount(member, weights=values) / np.bincount(member)


def paired_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], widening: float = 1.0
) -> Estimate:
    """The mean of first minus second, each a (values, prompts), over the prompts of both, with a paired t-interval."""
    (names, means), (others, other_means) = cluster_means(*first), cluster_means(*second)
    shared, left, right = np.intersect1d(names, others, return_indices=True)
    return clustered_mean(means[left] - other_means[right], shared, bounds=None, widening=widening)
