"""A discriminator's accuracy in training and in testing, tried out in small: a linear judge of words learns, on A, to
tell the teacher's answers from a student's, and is asked about the pairs it knows, other prompts of A, and B."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import vstack
from sklearn.linear_model import LogisticRegression

from verl.data_tools.compare.classifier import FOLDS, STRENGTH, vectorise
from verl.data_tools.compare.data import Side
from verl.data_tools.compare.statistics import Interval
from verl.tools.judge.statistics import CROSS_VALIDATED, Estimate, clustered_mean
from verl.tools.judge.two_sample import fold_of_prompts


@dataclass(frozen=True)
class Gap:
    """Shares of pairs whose teacher is scored above the student, ties half: of pairs that it was trained on, of other
    prompts of A, and of B's prompts that A does not have. shift: other prompts of A less B, which over-fitting alone
    leaves at 0; known: the pairs it was trained on less other prompts of A."""

    known_pairs: float
    other_prompts: Estimate
    b: Estimate
    shift: Interval

    @property
    def known(self) -> float:
        """What is lost from known pairs to other prompts of the same set."""
        return self.known_pairs - self.other_prompts.value


def measure_gap(a: Side, b: Side, seed: int) -> Gap | None:
    """Of sides with a student's answers; None where all of B's prompts are A's too.

    Every fold's judge is asked about all of B, so that A's other prompts and B's meet the same judges.
    """
    own, new = range(len(a)), [at for at in range(len(b)) if not a.knows(b.keys[at])]
    if not new:
        return None
    chosen = [(a, at) for at in own] + [(b, at) for at in new]
    table, _ = vectorise([side.answers[at] for side, at in chosen] + [side.students[at] for side, at in chosen])
    difference = (table[: len(chosen)] - table[len(chosen) :]).tocsr()
    fold = fold_of_prompts(len(own), FOLDS, seed)
    held, on_b, fitted = np.zeros(len(own)), np.zeros(len(new)), []
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        scores = difference @ _weights(difference[train], seed)
        outcomes = (np.sign(scores) + 1) / 2
        fitted.append(outcomes[train].mean())
        held[test] = outcomes[test]
        on_b += outcomes[len(own) :] / FOLDS
    other = clustered_mean(held, np.arange(len(own)), widening=CROSS_VALIDATED)
    there = clustered_mean(on_b, np.arange(len(new)))
    lost = other.value - there.value
    below = math.hypot(other.value - other.low, there.high - there.value)
    above = math.hypot(other.high - other.value, there.value - there.low)
    return Gap(float(np.mean(fitted)), other, there, Interval(lost, lost - below, lost + above))


def _weights(difference: object, seed: int) -> np.ndarray:
    """Of a logistic regression that scores differences (R, V), teacher less student, above 0."""
    labels = np.repeat([1, 0], difference.shape[0])
    model = LogisticRegression(C=STRENGTH, solver="liblinear", fit_intercept=False, random_state=seed)
    return model.fit(vstack([difference, -difference]), labels).coef_[0]
