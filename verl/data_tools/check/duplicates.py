"""Prompts that are equal or much alike, within a dataset and between two.

Equal is equal but for case, width of characters and white space. Alike is a Jaccard similarity of shingles: five
letters or two Chinese characters at a time, which carry about as much. MinHash finds candidates and the shingles
themselves decide. Shingles that most prompts have, as a template's frame, are not counted.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

from verl.data_tools.check.findings import Finding, Sample, Samples, asked
from verl.data_tools.check.rows import progress

_LETTERS, _CHARACTERS = 5, 2
# From this character on two say as much as five letters.
_FIRST_WIDE = "\u2e80"
_PERMUTATIONS = 128
# Candidates are taken from somewhat below, so that chance loses few pairs.
_BELOW = 0.15
_MOST_CANDIDATES = 100
# A shingle is a frame's if more than half of the prompts have it, of at least so many, looked up in so many.
_FRAME_SHARE, _FRAME_ROWS, _FRAME_SAMPLE = 0.5, 20, 2000

Key = tuple[tuple[str, str], ...]


def normal(text: str) -> str:
    """Without differences of case, width and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Prompt(NamedTuple):
    """A prompt to compare: its row, what makes it equal to another, and the text that makes it alike."""

    row: int
    key: Key
    text: str

    @property
    def question(self) -> Key:
        """The key without system messages."""
        return tuple(part for part in self.key if part[0] != "system")


def prompts_of(samples: Samples) -> list[Prompt]:
    """The prompts of the samples that there are."""
    return [
        Prompt(
            number,
            tuple((message["role"].lower(), normal(message["content"])) for message in sample.messages),
            normal(asked(sample.messages)),
        )
        for number, sample in enumerate(samples)
        if sample is not None
    ]


def shingles(text: str) -> set[int]:
    """Hashes of pieces of a text; of one that is shorter than a piece, itself."""
    found = set()
    for start, character in enumerate(text):
        size = _CHARACTERS if character >= _FIRST_WIDE else _LETTERS
        if start + size <= len(text) or not start:
            found.add(crc32(text[start : start + size].encode()))
    return found


def frame_of(texts: Sequence[str]) -> set[int]:
    """The shingles that most of the texts have."""
    some = texts[:: max(1, len(texts) // _FRAME_SAMPLE)]
    if len(some) < _FRAME_ROWS:
        return set()
    counts = Counter(shingle for text in some for shingle in shingles(text))
    return {shingle for shingle, count in counts.items() if count > _FRAME_SHARE * len(some)}


class Alike:
    """Prompts to which others may be alike.

    Args:
        threshold: the similarity from which on they are, 0 to 1.
        frame: shingles that do not count.
    """

    def __init__(self, threshold: float, frame: set[int]):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError("comparing prompts needs datasketch: pip install -e '.[data]'") from error
        self.threshold = threshold
        self.frame = frame
        self._prompts: list[Prompt] = []
        self._hash = MinHash(_PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(threshold=max(0.05, threshold - _BELOW), num_perm=_PERMUTATIONS)

    def find(self, prompt: Prompt, add: bool) -> tuple[Prompt, float] | None:
        """One that this is alike to, with the similarity, or None; then others are found to be alike to this one, if
        `add` says so."""
        own = self._shingles(prompt)
        if not own:
            return None
        hashed = self._hash.copy()
        hashed.update_batch(own)
        for place in sorted(self._index.query(hashed))[:_MOST_CANDIDATES]:
            other = self._prompts[place]
            theirs = self._shingles(other)
            similarity = len(own & theirs) / len(own | theirs)
            if similarity >= self.threshold and not _goes_on(prompt, other):
                return other, similarity
        if add:
            self._index.insert(len(self._prompts), hashed)
            self._prompts.append(prompt)
        return None

    def _shingles(self, prompt: Prompt) -> set[int]:
        return shingles(prompt.text) - self.frame


def _goes_on(prompt: Prompt, other: Prompt) -> bool:
    """Whether one is the other's conversation some turns later."""
    short, long = sorted((prompt.key, other.key), key=len)
    return len(short) < len(long) and long[: len(short)] == short


# ---------------------------------------------------------------------------------------------------------------------
# Within a dataset, and between two


def find_duplicates(samples: Samples, threshold: float) -> Iterator[Finding]:
    """Rows whose prompts have been before; of rows that are alike, all but the first."""
    prompts = prompts_of(samples)
    alike = Alike(threshold, frame_of([prompt.text for prompt in prompts]))
    first: dict[Key, int] = {}
    for prompt in progress(prompts, "comparing prompts"):
        before = first.setdefault(prompt.key, prompt.row)
        if before != prompt.row:
            same = _of(samples, before).answer.strip() == _of(samples, prompt.row).answer.strip()
            reason = f"with {'the same' if same else 'another'} answer"
            yield Finding("duplicate", prompt.row, reason, f"as {_place(samples, before, samples, prompt.row)}")
            continue
        near = alike.find(prompt, add=True)
        if near is not None:
            yield _near("near_duplicate", samples, prompt.row, samples, near)


def find_overlap(samples: Samples, others: Samples, threshold: float) -> Iterator[Finding]:
    """Rows whose prompts are among the others, whatever the system messages, or alike to one of them."""
    theirs = prompts_of(others)
    prompts = prompts_of(samples)
    alike = Alike(threshold, frame_of([prompt.text for prompt in prompts]))
    questions: dict[Key, int] = {}
    for prompt in theirs:
        if questions.setdefault(prompt.question, prompt.row) == prompt.row:
            alike.find(prompt, add=True)
    for prompt in progress(prompts, "comparing with --against"):
        same = questions.get(prompt.question)
        if same is not None:
            yield Finding("overlap", prompt.row, "the same prompt", f"as {_of(others, same).row.place}")
            continue
        near = alike.find(prompt, add=False)
        if near is not None:
            yield _near("near_overlap", samples, prompt.row, others, near)


def _near(kind: str, samples: Samples, row: int, others: Samples, near: tuple[Prompt, float]) -> Finding:
    other, similarity = near
    shown = f"{similarity:.0%} as {_place(others, other.row, samples, row)}: {asked(_of(others, other.row).messages)}"
    return Finding(kind, row, "much the same prompt", shown)


def _place(others: Samples, other: int, samples: Samples, row: int) -> str:
    """Where another row is: in the same file, by its number alone."""
    there, here = _of(others, other).row, _of(samples, row).row
    return f"row {there.number}" if there.path == here.path else there.place


def _of(samples: Samples, row: int) -> Sample:
    sample = samples[row]
    assert sample is not None
    return sample
