"""What can be found in a dataset: kinds of findings, and where each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from verl.utils.dataset.rows import Row
from verl.utils.dataset.texts import Messages

# In the order of the report: what each kind is, as a sentence about its rows.
KINDS = {
    "bad": "training refuses them",
    "empty": "the prompt or the answer is empty",
    "overlap": "the prompt is in --against too, but for case and spaces",
    "near_overlap": "a prompt much like it is in --against",
    "duplicate": "the prompt has been before, but for case and spaces",
    "near_duplicate": "a prompt much like it has been before",
    "secret": "something has the shape of a key or password",
    "refused": "the answer refuses",
    "cut": "the answer was cut off",
    "no_end": "the answer's last sentence has no end: it may have been cut off",
    "template": "the model does not read the texts as they stand here",
    "special_text": "a special token's name is in a text",
    "language": "the answer is in another language than the prompt",
    "long": "much longer than the others",
    "short": "much shorter than the others",
}
# What is looked for only where it can be.
NEEDS = {
    "overlap": "against", "near_overlap": "against", "template": "model", "special_text": "model",
}  # fmt: skip


class Finding(NamedTuple):
    """Something in a row.

    kind: one of KINDS.
    row: its place in the samples.
    reason: what it is; equal ones are counted, so it names no place.
    shown: the text or the place that shows it.
    """

    kind: str
    row: int
    reason: str
    shown: str = ""


@dataclass(frozen=True)
class Sample:
    """A row of a file; messages and answer only where training takes them."""

    row: Row
    messages: Messages
    answer: str


def asked(messages: Messages) -> str:
    """What is asked: the texts of a prompt but for its system messages."""
    return "\n".join(message["content"] for message in messages if message["role"].lower() != "system")


def last_question(messages: Messages) -> str:
    """The text of a prompt's last message."""
    return messages[-1]["content"]


Samples = Sequence[Sample | None]
