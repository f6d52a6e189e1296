"""The two-sample test of one student as a number of trials, a fresh discriminator each, whose outcomes are kept.

P prompts, K pairs, S seeds, F folds: S x F trials.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from verl.tools.judge.kept import Kept, digest
from verl.tools.judge.two_sample import (
    Judge,
    JudgeSettings,
    Pair,
    TwoSample,
    fold_of_prompts,
    outcome_of,
    updates_per_epoch,
)
from verl.utils.console import printable
from verl.utils.progress import Progress


@dataclass(frozen=True)
class Trial:
    """A discriminator that is tested on one fold's pairs and trained on all others; `tested` says which is which, (K,).

    repetition: of the whole test, from 0 to S - 1. seed: of the head and the order of pairs.
    """

    repetition: int
    fold: int
    seed: int
    tested: np.ndarray

    def split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """K values: those to train on, and those to test on."""
        sides: tuple[list[Any], list[Any]] = ([], [])
        for value, tested in zip(values, self.tested, strict=True):
            sides[int(tested)].append(value)
        return sides

    def request(self, pairs: Sequence[str], known_by: Any) -> str:
        """What the outcome is kept by; `pairs` by their digests, and all else that it depends on, in JSON."""
        return digest([known_by, self.seed, *self.split(pairs)])

    def updates(self, settings: JudgeSettings) -> int:
        """That its training takes."""
        return settings.epochs * updates_per_epoch(int((~self.tested).sum()), settings)


@dataclass(frozen=True)
class Outcome:
    """Of a trial: the discriminator's accuracy on what it was `fitted` to, and, of each tested pair, `outcome_of`."""

    fitted: float
    outcomes: list[float]


def trials_of(pairs: Sequence[Pair], settings: JudgeSettings) -> list[Trial]:
    """One for every seed and fold. Folds, heads and the order of pairs are functions of these, so that students
    compare."""
    prompts = np.array([pair.prompt for pair in pairs])
    result = []
    for repetition in range(settings.seeds):
        fold_of_pair = fold_of_prompts(prompts.max() + 1, settings.folds, repetition)[prompts]
        for fold in range(settings.folds):
            result.append(Trial(repetition, fold, repetition * settings.folds + fold, fold_of_pair == fold))
    return result


def try_one(judge: Judge, trial: Trial, pairs: Sequence[Pair], eos_token_id: int, progress: Progress) -> Outcome:
    """Train and test."""
    learned, tested = trial.split(pairs)
    fitted = judge.train(learned, trial.seed, progress)
    return Outcome(fitted, outcome_of(judge.differences(tested, eos_token_id)).tolist())


def together(pairs: Sequence[Pair], settings: JudgeSettings, outcomes: Sequence[tuple[Trial, Outcome]]) -> TwoSample:
    """What all trials of a student say."""
    told = np.zeros((settings.seeds, len(pairs)))
    for trial, outcome in outcomes:
        told[trial.repetition, trial.tested] = outcome.outcomes
    prompts, gaps = (np.array([getattr(pair, name) for pair in pairs]) for name in ("prompt", "length_gap"))
    return TwoSample(told, prompts, gaps, float(np.mean([outcome.fitted for _, outcome in outcomes])))


def two_sample(
    student: str,
    pairs: Sequence[Pair],
    judge: Callable[[], Judge],
    settings: JudgeSettings,
    *,
    known_by: Any,
    eos_token_id: int,
    kept: Kept,
) -> TwoSample:
    """Make the trials whose outcomes are not kept yet.

    Args:
        judge: asked for only where a trial is missing.
        known_by: all that outcomes depend on beside pairs, seeds and folds; JSON can hold it.
    """
    known_pairs = [digest([pair.reference, pair.candidate]) for pair in pairs]
    requests = {trial.request(known_pairs, known_by): trial for trial in trials_of(pairs, settings)}
    missing = {request: trial for request, trial in requests.items() if request not in kept.replies}
    if len(missing) < len(requests):
        taken = f"{len(requests) - len(missing)} of {len(requests)} are taken from {kept.path}"
        print(printable(f"discriminators of {student}: {taken}"), file=sys.stderr)
    if missing:
        fresh, updates = judge(), sum(trial.updates(settings) for trial in missing.values())
        with Progress(updates, f"discriminators of {student}", "update") as progress:
            for request, trial in missing.items():
                outcome = try_one(fresh, trial, pairs, eos_token_id, progress)
                kept.put(request, asdict(outcome), student=student, repetition=trial.repetition, fold=trial.fold)
    return together(pairs, settings, [(trial, Outcome(**kept.replies[request])) for request, trial in requests.items()])
