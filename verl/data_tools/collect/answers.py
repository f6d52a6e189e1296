"""What an answer is: one to learn from, refused, empty, or cut; and the thoughts in front of it."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from verl.data_tools.answers import CUT_REASONS, refuses_to_help

Kind = Literal["answered", "refused", "empty", "cut", "failed"]
APART: tuple[Kind, ...] = ("refused", "empty", "cut", "failed")
Reasoning = Literal["drop", "think"]

# A thought at an answer's beginning, which a server left there; the template may have opened it already.
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


class Answer(NamedTuple):
    """An answer without its thoughts, the thoughts ("" where there are none), and what it is."""

    text: str
    thought: str
    kind: Kind


def judge_answer(record: dict[str, Any]) -> Answer:
    """The answer in a line of the log."""
    if "error" in record:
        return Answer("", "", "refused" if record["error"]["filtered"] else "failed")
    text, thought = split_thought(record["answer"] or "")
    thought = record["reasoning"] or thought
    if record["finish_reason"] == "content_filter" or record["refusal"] or refuses_to_help(text):
        return Answer(text or record["refusal"], thought, "refused")
    if record["finish_reason"] in CUT_REASONS:
        return Answer(text, thought, "cut")
    return Answer(text, thought, "answered" if text.strip() else "empty")


def split_thought(text: str) -> tuple[str, str]:
    """An answer and the thought that stands in front of it, closed by </think>; an answer that never closes it has no
    text."""
    if match := _THOUGHT.match(text):
        return text[match.end() :], match[1].strip()
    if text.lstrip().startswith("<think>"):
        return "", text.lstrip().removeprefix("<think>").strip()
    return text, ""


def with_reasoning(answer: Answer, reasoning: Reasoning) -> str:
    """What the student is to learn: the answer, behind its thoughts where they are asked for."""
    if reasoning == "drop" or not answer.thought:
        return answer.text
    return f"<think>\n{answer.thought}\n</think>\n\n{answer.text}"
