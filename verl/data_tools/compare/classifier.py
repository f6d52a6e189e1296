"""Can a small classifier tell the two sets apart? The two-sample test of Lopez-Paz & Oquab (arXiv 1610.06545).

Logistic regression on words and pairs of neighbours (TF-IDF; Chinese by character) is trained on some rows and tested
on others. Where both sets are drawn from one distribution it is right half of the time, whatever it learned. As many
rows of either side; a prompt that both have is never on both sides of the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from verl.data_tools.compare.data import Side
from verl.data_tools.compare.statistics import Finding, p_of_accuracy
from verl.data_tools.compare.words import shown, units
from verl.tools.judge.statistics import CROSS_VALIDATED, Estimate, clustered_mean
from verl.tools.judge.two_sample import fold_of_prompts

FOLDS, REPEATS = 5, 3
# Rows of either side: beyond these, time grows and nothing is seen that these do not show.
MOST_ROWS = 2000
FEATURES, LEAST_TEXTS, STRENGTH = 50_000, 2, 10.0
TELLING = 8


@dataclass(frozen=True)
class ToldApart:
    """accuracy: on rows it was not trained on, 1/2 where nothing tells the sets apart; the interval allows for what
    cross-validation adds. fitted: on its own training rows. telling: what speaks most for A, and for B."""

    accuracy: Estimate
    fitted: float
    p: float
    rows: int
    telling: tuple[list[str], list[str]]

    @property
    def visible(self) -> float:
        """The accuracy from which so many rows would have shown a difference, in half of all cases."""
        return 0.5 + 1.645 * CROSS_VALIDATED * 0.5 / (2 * self.rows) ** 0.5


def vectorise(texts: Sequence[str]) -> tuple[Any, TfidfVectorizer]:
    """TF-IDF of units (R, V), rows of length 1, and what made it: of those that several texts have, or, where there are
    none, of all."""
    common = TfidfVectorizer(analyzer=units, min_df=LEAST_TEXTS, sublinear_tf=True, max_features=FEATURES)
    try:
        return common.fit_transform(texts), common
    except ValueError:
        every = TfidfVectorizer(analyzer=units, sublinear_tf=True, max_features=FEATURES)
        return every.fit_transform(texts), every


def told_apart(a: Side, b: Side, texts: tuple[Sequence[str], Sequence[str]], seed: int) -> ToldApart:
    """How well texts of A and B are told apart.

    Args:
        texts: (A,), (B,) to look at, of the sides' rows.
    """
    labels = np.repeat([0, 1], [len(a), len(b)])
    _, prompts = np.unique(np.asarray([*a.keys, *b.keys], dtype=object), return_inverse=True)
    rows = min(len(a), len(b), MOST_ROWS)
    table, vectorizer = vectorise([*texts[0], *texts[1]])
    outcomes, tested, fitted = [], [], []
    for chosen, train, test in _folds(labels, prompts, rows, seed):
        model = LogisticRegression(C=STRENGTH, solver="liblinear", random_state=seed)
        model.fit(table[chosen[train]], labels[chosen[train]])
        outcomes.append(_right(model, table[chosen[test]], labels[chosen[test]]))
        tested.append(prompts[chosen[test]])
        fitted.append(_right(model, table[chosen[train]], labels[chosen[train]]).mean())
    accuracy = clustered_mean(np.concatenate(outcomes), np.concatenate(tested), widening=CROSS_VALIDATED)
    p = p_of_accuracy(accuracy.value, 2 * rows, CROSS_VALIDATED)
    telling = _telling(table, labels, vectorizer, seed)
    return ToldApart(accuracy, float(np.mean(fitted)), p, rows, telling)


def _folds(
    labels: np.ndarray, prompts: np.ndarray, rows: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every repetition and fold: as many rows of either side, and which of them to train on and to test."""
    for repeat in range(REPEATS):
        random = np.random.default_rng((seed, repeat))
        sides = [np.flatnonzero(labels == label) for label in (0, 1)]
        chosen = np.concatenate([np.sort(random.permutation(side)[:rows]) for side in sides])
        fold = fold_of_prompts(prompts.max() + 1, FOLDS, seed * REPEATS + repeat)[prompts[chosen]]
        for number in range(FOLDS):
            train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            if len(test) and len(np.unique(labels[chosen[train]])) == 2:
                yield chosen, train, test


def _right(model: LogisticRegression, table: Any, labels: np.ndarray) -> np.ndarray:
    """1 where it says the right side, 1/2 where it says neither."""
    scores = model.decision_function(table)
    return (np.sign(scores) * (2 * labels - 1) + 1) / 2


def _telling(table: Any, labels: np.ndarray, vectorizer: TfidfVectorizer, seed: int) -> tuple[list[str], list[str]]:
    model = LogisticRegression(C=1.0, solver="liblinear", class_weight="balanced", random_state=seed)
    weights = model.fit(table, labels).coef_[0]
    names, order = vectorizer.get_feature_names_out(), np.argsort(weights, kind="stable")
    sides = ([at for at in order if weights[at] < 0], [at for at in order[::-1] if weights[at] > 0])
    # A word and the same with a space beside it are one.
    a, b = (list(dict.fromkeys(shown(names[at]) for at in side[: 4 * TELLING]))[:TELLING] for side in sides)
    return a, b


def finding(what: str, result: ToldApart, names: tuple[str, str]) -> Finding:
    """2 x accuracy - 1 is the share of texts, at least, that tells by itself."""
    accuracy = result.accuracy
    typical = [f"of {name}: {' '.join(own[:4])}" for name, own in zip(names, result.telling, strict=True) if own]
    words = "; ".join(["50% is chance", *(["typical " + ", ".join(typical)] if typical else [])])
    return Finding(
        f"words of {what}",
        max(0.0, 2 * accuracy.value - 1),
        result.p,
        f"a small classifier tells {accuracy.value:.0%} of the {what} apart by their words ({words})",
    )
