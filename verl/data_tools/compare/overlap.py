"""Prompts of B that A has too, or nearly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from verl.data_tools.compare.data import Side
from verl.data_tools.compare.statistics import Interval, share
from verl.data_tools.compare.words import units

# Cosine of TF-IDF above which two prompts are nearly the same.
NEAR = 0.9
ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Overlap:
    """Shares of B's rows whose prompts are in A's files but for case, spaces and signs, and of those that are, or
    nearly are in the rows of A that were read.

    examples: rows of B and of A, from 0 within what was read, of prompts that are nearly the same.
    """

    same: Interval
    near: Interval
    examples: list[tuple[int, int]]


def find_overlap(a: Side, b: Side) -> Overlap:
    """How many of B's prompts A has."""
    same = np.array([a.knows(key) for key in b.keys])
    closest, cosine = _closest(a.prompts, b.prompts)
    near = same | (cosine >= NEAR)
    examples = [(int(at), int(closest[at])) for at in np.flatnonzero(near & ~same)[:3]]
    return Overlap(share(int(same.sum()), len(b)), share(int(near.sum()), len(b)), examples)


def _closest(a: list[str], b: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each text of B, the text of A that is most like it, and their cosine."""
    # Every word counts here: a rare one is what two questions of one form differ in.
    table = TfidfVectorizer(analyzer=units, sublinear_tf=True, dtype=np.float32).fit_transform([*a, *b])
    left, right = table[: len(a)].T.tocsc(), table[len(a) :]
    closest, cosine = [], []
    for start in range(0, len(b), ROWS_AT_ONCE):
        part = right[start : start + ROWS_AT_ONCE] @ left
        closest.append(np.asarray(part.argmax(axis=1)).ravel())
        cosine.append(part.max(axis=1).toarray().ravel())
    return np.concatenate(closest), np.concatenate(cosine)
