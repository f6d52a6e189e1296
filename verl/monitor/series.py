"""Metrics over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Series:
    """One metric: the steps at which it was logged, ascending, and its values, which may be nan or infinite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """One more value; of two for the newest step the later counts."""
        if self.steps and step == self.steps[-1]:
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)

    def finite(self) -> tuple[list[int], list[float]]:
        """Steps and values without those that are no finite number."""
        pairs = [pair for pair in zip(self.steps, self.values, strict=True) if math.isfinite(pair[1])]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass
class Run:
    """What was logged of a run: metrics step by step, and its settings where they are known (nested, else empty)."""

    name: str
    steps: dict[int, dict[str, float]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[int, Mapping[str, Any]]], settings: Mapping[str, Any] | None = None):
        """From (step, metrics) in any order. Of two values for one metric and step the later counts; what is no number
        is left out."""
        steps: dict[int, dict[str, float]] = {}
        for step, data in rows:
            numbers = {metric: number for metric, value in data.items() if (number := as_number(value)) is not None}
            steps.setdefault(step, {}).update(numbers)
        return cls(name, dict(sorted(steps.items())), settings or {})

    def series(self, metric: str) -> Series:
        """One metric over the run; empty where it was never logged."""
        found = Series()
        for step, data in self.steps.items():
            if metric in data:
                found.add(step, data[metric])
        return found

    @property
    def made(self) -> int:
        """How many steps were made: a validation after the last one, or before the first, is none."""
        trained = sum(any(not name.startswith("val/") for name in data) for data in self.steps.values())
        return trained or len(self.steps)

    @property
    def metrics(self) -> set[str]:
        """Names of all metrics that were logged."""
        return {metric for data in self.steps.values() for metric in data}


def as_number(value: Any) -> float | None:
    """A logged value as a float: numbers, and their texts ("nan" and "inf" among them); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
