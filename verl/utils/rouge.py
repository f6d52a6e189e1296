"""ROUGE-L for validation, on English, Chinese, Japanese and Korean alike.

F-measure of the longest common subsequence of tokens (Lin 2004, ROUGE, section 3). On ASCII text the tokens, and so the
score, are those of the `rouge-score` package without stemming; that package drops every other character, which would
score all Chinese answers 0. Here a CJK character is a token of its own, and other scripts are read by word.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

# Each range of characters that stands for itself, without the punctuation in between.
_CJK = "".join(
    (
        "\u3005-\u3007",  # 々〆〇: iteration mark, closing mark, zero
        "\u3041-\u3096\u309d-\u309f",  # Hiragana
        "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff",  # Katakana and its phonetic extensions
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",  # Han: extension A, the unified block, compatibility
        "\U00020000-\U0003ffff",  # Han: extensions on planes 2 and 3
        "\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff",  # Hangul letters
        "\u3131-\u318e\uac00-\ud7a3",  # Hangul compatibility letters and syllables
        "\uff66-\uff9f\uffa0-\uffdc",  # halfwidth Katakana and Hangul
    )
)
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def tokenize(text: str) -> list[str]:
    """Lower-cased tokens: single CJK characters, and words (runs of letters and digits) of every other script."""
    return _TOKEN.findall(text.lower())


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1]: 2 L / (m + n) for L common tokens in order, of m and n; 0 when a side has none.

    That is the harmonic mean of precision L / m and recall L / n.
    """
    predicted, expected = tokenize(prediction), tokenize(reference)
    if not predicted or not expected:
        return 0.0
    return 2 * LCSseq.similarity(predicted, expected) / (len(predicted) + len(expected))


def mean_rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean rouge_l over pairs.

    Raises:
        ValueError: the two differ in length, or there is no pair.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"need as many predictions ({len(predictions)}) as references ({len(references)}), and one")
    return sum(map(rouge_l, predictions, references)) / len(predictions)
