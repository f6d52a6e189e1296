"""A second judge that needs no GPU: a linear model on words and pairs of neighbouring words.

    python -m examples.real_text.words outputs/real_text/seed1/*/answers-*.parquet

As the two-sample judge it is trained to score the teacher's answer above the student's on some prompts and tested on
the others (five folds, three seeds), and 0.5 is a perfect student. It sees choice of words and punctuation and nothing
of their sense, and with a thousand pairs it is a sharper judge of these than a small language model trained on as many.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from verl.data_tools.compare.words import units
from verl.utils.console import printable

FEATURES = 2**15
FOLDS, SEEDS, UPDATES = 5, 3, 60
LEARNING_RATE, WEIGHT_PENALTY = 0.02, 1e-3


def features(texts: Sequence[str]) -> torch.Tensor:
    """(R, FEATURES), sparse: counts of words and of pairs of neighbours, hashed, over the root of the words' number."""
    rows, places, values = [], [], []
    for row, text in enumerate(texts):
        found = units(text)
        # Of n words there are n - 1 pairs.
        words = (len(found) + 1) // 2
        rows += [row] * len(found)
        places += [zlib.crc32(unit.encode()) % FEATURES for unit in found]
        values += [max(1, words) ** -0.5] * len(found)
    where = torch.tensor([rows, places], dtype=torch.long)
    size = (len(texts), FEATURES)
    return torch.sparse_coo_tensor(where, torch.tensor(values), size, check_invariants=False).coalesce()


def told_apart(prompts: Sequence[str], teachers: Sequence[str], students: Sequence[str]) -> np.ndarray:
    """(P,): how often the teacher's answer is scored above the student's, for each different prompt in their order, by
    models trained on other prompts; ties count half."""
    _, numbers = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    difference = (features(teachers) - features(students)).coalesce()
    outcomes = torch.zeros(len(difference))
    for seed in range(SEEDS):
        fold = (np.random.default_rng(seed).permutation(numbers.max() + 1) % FOLDS)[numbers]
        for number in range(FOLDS):
            tested, trained = (torch.from_numpy(np.flatnonzero(side)) for side in (fold == number, fold != number))
            weights = _trained(difference.index_select(0, trained))
            scores = difference.index_select(0, tested) @ weights
            outcomes[tested] += (scores.sign() + 1) / 2 / SEEDS
    return np.bincount(numbers, outcomes.numpy()) / np.bincount(numbers)


def accuracy(prompts: Sequence[str], teachers: Sequence[str], students: Sequence[str]) -> tuple[float, float]:
    """The mean of `told_apart`, and its standard error over prompts."""
    shares = told_apart(prompts, teachers, students)
    return float(shares.mean()), float(shares.std(ddof=1) / len(shares) ** 0.5)


def _trained(difference: torch.Tensor) -> torch.Tensor:
    """Weights (FEATURES,) by logistic regression on differences (R, FEATURES), sparse, which should score above 0.

    The gradient of the mean of softplus(-score) is -sigmoid(-score) / R for each row; written out, since sparse
    matrices are slow under autograd.
    """
    weights = torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=LEARNING_RATE)
    by_row, by_column = difference.to_sparse_csr(), difference.t().to_sparse_csr()
    with torch.no_grad():
        for _ in range(UPDATES):
            slope = -torch.sigmoid(-(by_row @ weights)) / len(difference)
            weights.grad = by_column @ slope + 2 * WEIGHT_PENALTY * weights
            optimizer.step()
    return weights.detach()


def main(files: Sequence[str]) -> None:
    """A line per file: the share, and its standard error over prompts."""
    if not files:
        sys.exit(__doc__)
    for file in files:
        answers = pd.read_parquet(file)
        share, error = accuracy(*(answers[column].tolist() for column in ("content", "teacher", "text")))
        print(printable(f"{share:.3f} ± {error:.3f}  {file}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
