"""Lengths of prompts and answers on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.data_tools.compare.statistics import Finding, Interval, difference_of_means, kolmogorov_smirnov


@dataclass(frozen=True)
class Sizes:
    """Means and medians of A and of B, B's mean less A's, and the Kolmogorov-Smirnov distance with its p."""

    what: str
    unit: str
    means: tuple[float, float]
    medians: tuple[float, float]
    difference: Interval
    distance: float
    p: float


def compare_sizes(what: str, unit: str, a: Sequence[int], b: Sequence[int]) -> Sizes:
    """Of lengths (A,) and (B,)."""
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    distance, p = kolmogorov_smirnov(left, right)
    return Sizes(
        what, unit, (float(left.mean()), float(right.mean())), (float(np.median(left)), float(np.median(right))),
        difference_of_means(left, right), distance, p,
    )  # fmt: skip


def finding(sizes: Sizes, names: tuple[str, str]) -> Finding:
    """In words."""
    longer = names[int(sizes.medians[1] > sizes.medians[0])]
    medians = f"median {sizes.medians[0]:.0f} {sizes.unit} in {names[0]}, {sizes.medians[1]:.0f} in {names[1]}"
    says = f"the {sizes.what} of {longer} are longer ({medians})"
    if sizes.medians[0] == sizes.medians[1]:
        says = f"the lengths of the {sizes.what} spread otherwise ({medians})"
    return Finding(f"lengths of {sizes.what}, in {sizes.unit}", sizes.distance, sizes.p, says)
