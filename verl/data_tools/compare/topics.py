"""What prompts are about, in both sets: clusters over both, and the share of each set in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.preprocessing import normalize

from verl.data_tools.compare.statistics import (
    ALPHA,
    Finding,
    Interval,
    difference_of_shares,
    holm,
    p_of_shares,
    share,
)
from verl.data_tools.compare.words import terms

TERMS, COMMON, LEAST_TEXTS = 20_000, 0.5, 3
DIMENSIONS, STARTS, TOP = 100, 5, 6
# Texts to a cluster on average, below which clusters are noise.
TEXTS_PER_TOPIC = 10
SHUFFLES = 1999
# A side that is many times larger than the other would make all of the clusters.
LARGER = 3


@dataclass(frozen=True)
class Topic:
    """A cluster: its top words, the share of A and of B in it, B's less A's, and whether that is more than chance."""

    words: list[str]
    a: Interval
    b: Interval
    difference: Interval
    p: float
    differs: bool


@dataclass(frozen=True)
class Topics:
    """Clusters, the largest difference first. distance: half of the sum of |B's share - A's|, less what chance makes of
    it. p: by shuffling which prompt is whose."""

    topics: list[Topic]
    distance: float
    p: float


def find_topics(a: Sequence[str], b: Sequence[str], count: int, seed: int) -> Topics | None:
    """Clusters of both together, which know nothing of whose a text is; None where texts have too few words in common
    to be put into two. Of the larger side, at most LARGER times as many texts as of the other."""
    random, most = np.random.default_rng(seed), LARGER * min(len(a), len(b))
    a, b = ([side[at] for at in np.sort(random.permutation(len(side))[:most])] for side in (a, b))
    texts, labels = [*a, *b], np.repeat([0, 1], [len(a), len(b)])
    vectorizer = TfidfVectorizer(
        analyzer=lambda text: [term for term in terms(text) if term not in ENGLISH_STOP_WORDS],
        min_df=min(LEAST_TEXTS, max(1, len(texts) // 20)), max_df=COMMON, max_features=TERMS, sublinear_tf=True,
    )  # fmt: skip
    try:
        table = vectorizer.fit_transform(texts)
    except ValueError:
        # Not a word is in several texts and not in most.
        return None
    dense = _reduced(table, seed)
    clusters = min(count, len(texts) // TEXTS_PER_TOPIC, len(np.unique(dense.round(6), axis=0)))
    if clusters < 2:
        return None
    member = KMeans(clusters, n_init=STARTS, random_state=seed).fit_predict(dense)
    names = vectorizer.get_feature_names_out()
    overall = np.asarray(table.mean(axis=0)).ravel()
    found = []
    for cluster in np.unique(member):
        inside = member == cluster
        weight = np.asarray(table[np.flatnonzero(inside)].mean(axis=0)).ravel() - overall
        words = [names[at] for at in np.argsort(-weight, kind="stable")[:TOP] if weight[at] > 0]
        counts = [(int((inside & (labels == side)).sum()), size) for side, size in ((0, len(a)), (1, len(b)))]
        found.append((words, counts))
    return _compared(found, member, labels, seed)


def _reduced(table: csr_matrix, seed: int) -> np.ndarray:
    """Rows of length 1 in the directions in which rows vary most."""
    if table.shape[1] <= DIMENSIONS:
        return normalize(table.toarray())
    return normalize(TruncatedSVD(DIMENSIONS, random_state=seed).fit_transform(table))


def _compared(
    found: list[tuple[list[str], list[tuple[int, int]]]], member: np.ndarray, labels: np.ndarray, seed: int
) -> Topics:
    p_values = [p_of_shares(*counts) for _, counts in found]
    topics = [
        Topic(words, share(*counts[0]), share(*counts[1]), difference_of_shares(*counts), p, adjusted < ALPHA)
        for (words, counts), p, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]
    distance, by_chance = _distances(member, labels, seed)
    p = (1 + int((by_chance >= distance - 1e-12).sum())) / (1 + SHUFFLES)
    topics.sort(key=lambda topic: (-abs(topic.difference.value), topic.words))
    return Topics(topics, max(0.0, distance - float(by_chance.mean())), p)


def _distances(member: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Total variation between the shares of both sides, and those after each of SHUFFLES shuffles of the labels."""
    random, count = np.random.default_rng(seed), member.max() + 1
    totals, size = np.bincount(member, minlength=count), int(labels.sum())

    def distance(b: np.ndarray) -> np.ndarray:
        return np.abs(b / size - (totals - b) / (len(labels) - size)).sum(-1) / 2

    # Which of all texts are B's is a draw without replacement: of each cluster so many.
    drawn = random.multivariate_hypergeometric(totals, size, SHUFFLES)
    return float(distance(np.bincount(member[labels == 1], minlength=count))), distance(drawn)


def finding(result: Topics, names: tuple[str, str]) -> Finding:
    """In words."""
    most = next((topic for topic in result.topics if topic.differs), result.topics[0])
    words = ", ".join(most.words[:4]) or "no common words"
    return Finding(
        "topics of prompts",
        result.distance,
        result.p,
        f'the prompts are about other things: those like "{words}" are {most.a.value:.0%} of {names[0]} and '
        f"{most.b.value:.0%} of {names[1]}",
    )
