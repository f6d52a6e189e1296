"""Texts that are much alike: near-duplicates among prompts, for `check` and `split`.

Alike is a Jaccard index of shingles, which are runs of five letters, or of three Chinese, Japanese or Korean
characters. MinHash finds candidates, and the shingles themselves decide. Runs that more than half of the texts have, as
a template's frame, do not count. Case, width of characters and white space make no difference.

Left out: texts that say the same in other words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

PERMUTATIONS = 128
# The share of pairs at the threshold that MinHash may miss.
MISSED = 1e-6
_LETTERS, _CHARACTERS = 5, 3
# From this character on three say as much as five letters.
_FIRST_WIDE = "\u2e80"
_SPACES = re.compile(r"\s+")
# A shingle is a frame's if more than half of the texts have it, of at least so many, looked up in so many.
_FRAME_SHARE, _FRAME_TEXTS, _FRAME_SAMPLE = 0.5, 20, 2000


def normalise(text: str) -> str:
    """The text without what does not make another one: case, white space, compatible forms of characters."""
    return _SPACES.sub("", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def shingles(text: str) -> frozenset[str]:
    """The runs that a normalised text is made of; of one that is shorter than a run, itself."""
    found = set()
    for start, character in enumerate(text):
        size = _CHARACTERS if character >= _FIRST_WIDE else _LETTERS
        if start + size <= len(text) or not start:
            found.add(text[start : start + size])
    return frozenset(found)


def frame_of(texts: Sequence[str]) -> frozenset[str]:
    """The shingles that most of the normalised texts have."""
    some = texts[:: max(1, len(texts) // _FRAME_SAMPLE)]
    if len(some) < _FRAME_TEXTS:
        return frozenset()
    counts = Counter(shingle for text in some for shingle in shingles(text))
    return frozenset(shingle for shingle, count in counts.items() if count > _FRAME_SHARE * len(some))


def bands(threshold: float) -> tuple[int, int]:
    """Bands of MinHash, and rows in each: the fewest comparisons that find all pairs at the threshold but MISSED.

    A band of r rows agrees with probability t^r, and b bands all differ with (1 - t^r)^b.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) < MISSED:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


class Sketch(NamedTuple):
    """A text, and the MinHash of its shingles."""

    text: str
    hashed: Any


class NearTexts:
    """Normalised texts to which others may be alike, numbered from 0 as they are added.

    Args:
        threshold: the Jaccard index from which on they are, 0 to 1.
        frame: shingles that do not count, but in a text that has no others.

    Raises:
        ValueError: the extra `data` is not installed.
    """

    def __init__(self, threshold: float, frame: frozenset[str]):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError("comparing prompts needs datasketch: pip install -e '.[data]'") from error
        self.threshold = threshold
        self.frame = frame
        self._texts: list[str] = []
        self._hash = MinHash(PERMUTATIONS, hashfunc=crc32)
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))

    def sketch(self, text: str) -> Sketch:
        """What a text is looked up and added by."""
        hashed = self._hash.copy()
        hashed.update_batch([run.encode("utf-8", "surrogatepass") for run in self._shingles(text)])
        return Sketch(text, hashed)

    def add(self, sketch: Sketch) -> None:
        """Others are found to be alike to this one from now on."""
        self._index.insert(len(self._texts), sketch.hashed)
        self._texts.append(sketch.text)

    def candidates(self, sketch: Sketch) -> list[int]:
        """Numbers of texts that may be alike, ascending: all that are, but for MISSED, and others."""
        return sorted(self._index.query(sketch.hashed)) if sketch.text else []

    def similarity(self, sketch: Sketch, number: int) -> float:
        """The Jaccard index with a text."""
        own, other = self._shingles(sketch.text), self._shingles(self._texts[number])
        return len(own & other) / len(own | other)

    def _shingles(self, text: str) -> frozenset[str]:
        own = shingles(text)
        return own - self.frame or own
