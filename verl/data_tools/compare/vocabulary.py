"""Words of B that A does not have, beside what chance makes of it: words are those of `verl.utils.rouge`, in Chinese,
Japanese and Korean single characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from verl.data_tools.compare.statistics import Finding
from verl.utils.rouge import tokenize

SPLITS = 199
SHOWN = 8


@dataclass(frozen=True)
class Unseen:
    """Shares of B that do not occur in A: of its different words, and of all its words. by_chance: that of all words
    where rows of both are dealt out again, its 2.5%, 50% and 97.5%. p: of as many by chance. most: the most frequent
    ones."""

    types: float
    tokens: float
    by_chance: tuple[float, float, float]
    p: float
    most: list[str]


def count_words(texts: Sequence[str]) -> tuple[csr_matrix, list[str]]:
    """Counts (R, V) of the words of each text, and the words."""
    numbers: dict[str, int] = {}
    columns: list[int] = []
    ends = [0]
    for text in texts:
        columns += [numbers.setdefault(word, len(numbers)) for word in tokenize(text)]
        ends.append(len(columns))
    table = csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(texts), max(1, len(numbers))))
    table.sum_duplicates()
    return table, list(numbers)


def _unseen(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Shares of types and of tokens of B's counts (V,) whose count in A (V,) is 0; 0 without a word."""
    if not b.sum():
        return 0.0, 0.0
    new = (a == 0) & (b > 0)
    return float(new.sum() / (b > 0).sum()), float(b[new].sum() / b.sum())


def find_unseen(a: Sequence[str], b: Sequence[str], seed: int) -> Unseen:
    """B's words (B texts) that A (A texts) does not have."""
    table, words = count_words([*a, *b])
    total, size = np.asarray(table.sum(axis=0)).ravel(), len(b)
    own = np.asarray(table[len(a) :].sum(axis=0)).ravel()
    types, tokens = _unseen(total - own, own)
    random = np.random.default_rng(seed)
    dealt = []
    for _ in range(SPLITS):
        mine = np.zeros(len(a) + size)
        mine[random.permutation(len(mine))[:size]] = 1
        drawn = table.T @ mine
        dealt.append(_unseen(total - drawn, drawn)[1])
    chance = np.array(dealt)
    new = np.where(total - own == 0, own, 0)
    most = [words[at] for at in np.argsort(-new, kind="stable")[:SHOWN] if new[at]] if words else []
    p = (1 + int((chance >= tokens - 1e-12).sum())) / (1 + SPLITS)
    low, middle, high = (float(np.quantile(chance, at)) for at in (0.025, 0.5, 0.975))
    return Unseen(types, tokens, (low, middle, high), p, most)


def finding(what: str, result: Unseen, names: tuple[str, str]) -> Finding:
    """In words."""
    return Finding(
        f"vocabulary of {what}",
        max(0.0, result.tokens - result.by_chance[1]),
        result.p,
        f"{result.tokens:.1%} of the words in the {what} of {names[1]} do not occur in {names[0]} (by chance "
        f"{result.by_chance[1]:.1%}), such as {', '.join(result.most[:4])}",
    )
