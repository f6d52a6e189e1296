"""Prompts that are equal or much alike (`near.py`), within a dataset and between two.

Equal is equal but for case, width of characters and white space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from verl.data_tools.check.findings import Finding, Sample, Samples, asked
from verl.data_tools.check.rows import progress
from verl.data_tools.near import NearTexts, frame_of, normalise

_MOST_CANDIDATES = 100

Key = tuple[tuple[str, str], ...]


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
            tuple((message["role"].lower(), normalise(message["content"])) for message in sample.messages),
            normalise(asked(sample.messages)),
        )
        for number, sample in enumerate(samples)
        if sample is not None
    ]


class Alike:
    """Prompts to which others may be alike.

    Args:
        threshold: the similarity from which on they are, 0 to 1.
        prompts: those whose common frame does not count.
    """

    def __init__(self, threshold: float, prompts: Sequence[Prompt]):
        self._near = NearTexts(threshold, frame_of([prompt.text for prompt in prompts]))
        self._prompts: list[Prompt] = []

    def find(self, prompt: Prompt, add: bool) -> tuple[Prompt, float] | None:
        """One that this is alike to, with the similarity, or None; then others are found to be alike to this one, if
        `add` says so."""
        sketch = self._near.sketch(prompt.text)
        for place in self._near.candidates(sketch)[:_MOST_CANDIDATES]:
            other, similarity = self._prompts[place], self._near.similarity(sketch, place)
            if similarity >= self._near.threshold and not _goes_on(prompt, other):
                return other, similarity
        if add:
            self._near.add(sketch)
            self._prompts.append(prompt)
        return None


def _goes_on(prompt: Prompt, other: Prompt) -> bool:
    """Whether one is the other's conversation some turns later."""
    short, long = sorted((prompt.key, other.key), key=len)
    return len(short) < len(long) and long[: len(short)] == short


# ---------------------------------------------------------------------------------------------------------------------
# Within a dataset, and between two


def find_duplicates(samples: Samples, threshold: float) -> Iterator[Finding]:
    """Rows whose prompts have been before; of rows that are alike, all but the first."""
    prompts = prompts_of(samples)
    alike = Alike(threshold, prompts)
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
    alike = Alike(threshold, prompts)
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
