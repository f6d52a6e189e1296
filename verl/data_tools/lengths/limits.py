"""Limits that fit measured lengths: pure functions of arrays. R rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)
# A limit that keeps everything is taken if it is at most so many times the one that keeps the wanted share: rows are
# packed, so a limit that few rows reach costs little; one that a single row stretches costs memory in every estimate.
WORTH_KEEPING_ALL = 1.5
# Tokens of a prompt below which a limit costs nothing worth a row.
FREE_PROMPT = 512
# Places in which a context that is too short for both limits may be cut.
CUTS = 200


@dataclass(frozen=True)
class Summary:
    """Of lengths: their number, mean, largest, and percentiles by percent, each of them a length that occurs."""

    count: int
    mean: float
    longest: int
    percentiles: dict[float, int]


@dataclass(frozen=True)
class Limits:
    """Tokens that a prompt and an answer with EOS may have, and the shares of the rows that go beyond.

    too_long_prompts: of all rows. cut_answers: of the rows whose prompts fit. whole: of all rows, those of which both
    fit. by_context: whether the model's context was what limited them.
    """

    prompt: int
    answer: int
    too_long_prompts: float
    cut_answers: float
    whole: float
    by_context: bool = False

    @property
    def together(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.answer


def summarise(lengths: np.ndarray) -> Summary:
    """Percentiles are the smallest length that at least so many percent of all do not exceed."""
    found = np.percentile(lengths, PERCENTS, method="inverted_cdf")
    percentiles = {percent: int(value) for percent, value in zip(PERCENTS, found, strict=True)}
    return Summary(len(lengths), float(lengths.mean()), int(lengths.max()), percentiles)


def rounded_up(tokens: int) -> int:
    """To a multiple of 16 or, where that is larger, of a power of two that is less than an eighth of it."""
    step = max(16, 2 ** (int(tokens).bit_length() - 4))
    return -(-int(tokens) // step) * step


def limit_for(lengths: np.ndarray, keep: float, free: int = 0) -> int:
    """A round limit that at least the share `keep` of the lengths does not exceed: all, where that is not much more, or
    not more than `free`."""
    enough = rounded_up(int(np.percentile(lengths, 100 * keep, method="inverted_cdf")))
    everything = rounded_up(int(lengths.max()))
    return everything if everything <= max(free, WORTH_KEEPING_ALL * enough) else enough


def fit(prompts: np.ndarray, answers: np.ndarray, keep: float, context: int | None = None) -> Limits:
    """Limits for prompts (R,) and answers (R,): each keeps the share `keep` of its side whole, if the context of the
    model lets it; else the cut of the context that leaves most rows whole, in both parts.

    Raises:
        ValueError: no row fits into the context.
    """
    prompt, answer = limit_for(prompts, keep, FREE_PROMPT), limit_for(answers, keep)
    if context is None or prompt + answer <= context:
        return _limits(prompts, answers, prompt, answer)
    # What is rounded up may be more than there is in spite of all rows fitting.
    places = np.unique(np.percentile(prompts, np.linspace(0, 100, CUTS), method="inverted_cdf")).astype(int)
    places = places[places < context]
    kept = [int(((prompts <= place) & (answers <= context - place)).sum()) for place in places]
    if not kept or not max(kept):
        shortest = int((prompts + answers).min())
        raise ValueError(
            f"expected rows that fit into the model's context of {context} tokens, got {shortest} in the shortest; "
            "take a model with a longer context, or other data"
        )
    best = int(places[int(np.argmax(kept))])
    return _limits(prompts, answers, best, context - best, by_context=True)


def _limits(prompts: np.ndarray, answers: np.ndarray, prompt: int, answer: int, by_context: bool = False) -> Limits:
    fits = prompts <= prompt
    whole = fits & (answers <= answer)
    cut = 1 - whole.sum() / max(1, fits.sum())
    return Limits(prompt, answer, float(1 - fits.mean()), float(cut), float(whole.mean()), by_context)


def histogram(lengths: np.ndarray, bins: int = 16) -> list[tuple[int, int, int]]:
    """(from, to, count) of bins of equal round width, both ends counted in; the last one has whatever is longer than
    the 99th percentile's bin."""
    top = int(np.percentile(lengths, 99, method="inverted_cdf"))
    width = max(1, -(-(top + 1) // bins))
    width = width if width < 8 else -(-width // 8) * 8
    counts = np.bincount(np.minimum(lengths // width, top // width + 1))
    found = [(at * width, (at + 1) * width - 1, int(count)) for at, count in enumerate(counts)]
    if len(counts) == top // width + 2:
        found[-1] = (found[-1][0], int(lengths.max()), found[-1][2])
    return found
