"""Plain numbers about a student's answers, without any judge: pure functions of texts and lengths.

Words are those of `verl.utils.rouge`: lower-cased runs of letters and digits, and in Chinese, Japanese and Korean
single characters, so that both are counted alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl.utils.rouge import rouge_l, tokenize

LOOP_WORDS = 8
LOOP_SHARE = 0.3
NGRAMS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Numbers:
    """What can be counted of one side's answers.

    rouge_l: mean ROUGE-L F-measure to the teacher's answer.
    mean_tokens, median_tokens: of the answers, EOS included. length_ratio: the mean, over the teacher's.
    cut: share of answers that did not end. loops: share of answers that are `in_loop`.
    distinct: distinct 1-, 2-, 3- and 4-grams over all, see `distinct_ngrams`.
    """

    answers: int
    rouge_l: float
    mean_tokens: float
    median_tokens: float
    length_ratio: float
    cut: float
    loops: float
    distinct: tuple[float, ...]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def repeated_share(text: str, n: int = LOOP_WORDS) -> float:
    """The share of the text's n-word sequences, overlapping ones included, that occur before in it; 0 without one."""
    sequences = _ngrams(tokenize(text), n)
    return (len(sequences) - len(set(sequences))) / len(sequences) if sequences else 0.0


def in_loop(text: str) -> bool:
    """Whether more than LOOP_SHARE of its 8-word sequences are repeated."""
    return repeated_share(text) > LOOP_SHARE


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts (Li et al., arXiv 1510.03055, section 5); 0 without one.

    It falls with the number and the length of the texts: compare sides with as many answers only.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(tokenize(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def numbers_of(
    texts: Sequence[Sequence[str]],
    lengths: Sequence[Sequence[int]],
    cut: Sequence[Sequence[bool]],
    teacher: Sequence[str],
    teacher_mean_tokens: float,
) -> Numbers:
    """Numbers of a student's answers, several to each of P prompts.

    Args:
        texts, lengths, cut: (P, answers to the prompt) each; lengths in tokens, EOS included.
        teacher: (P,) the teacher's answers.

    Distinct n-grams are counted over one answer per prompt, and averaged over the answers that every prompt has, so
    that a student with eight answers to a prompt compares with a teacher with one.
    """
    every = min(map(len, texts))
    rouge = [rouge_l(text, wanted) for answers, wanted in zip(texts, teacher, strict=True) for text in answers]
    tokens = np.concatenate([np.asarray(part) for part in lengths])
    return Numbers(
        answers=len(rouge),
        rouge_l=float(np.mean(rouge)),
        mean_tokens=float(tokens.mean()),
        median_tokens=float(np.median(tokens)),
        length_ratio=float(tokens.mean() / teacher_mean_tokens),
        cut=float(np.mean([flag for part in cut for flag in part])),
        loops=float(np.mean([in_loop(text) for answers in texts for text in answers])),
        distinct=tuple(
            float(np.mean([distinct_ngrams([answers[k] for answers in texts], n) for k in range(every)]))
            for n in NGRAMS
        ),
    )
