"""Rows of any format as turns: the messages before an answer, and the answer.

Texts stay as they are, to the last space. What cannot be kept whole (a picture, a tool's call) is a `LeftOut` with its
reason, which names no place, so that equal ones can be counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from verl.data_tools.convert.formats import (
    ALPACA,
    HISTORY,
    INPUTS,
    MESSAGES,
    SHAREGPT,
    SYSTEMS,
    TOOLS,
    VERL,
    Layout,
    has,
    unpacked,
    value_of,
)
from verl.data_tools.convert.json_files import is_conversation
from verl.utils.dataset.faults import fault_of_answer, fault_of_messages

SYSTEM, USER, ASSISTANT, TOOL, CALL = "system", "user", "assistant", "tool", "call"
ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), TOOL),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}  # fmt: skip
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = tuple(name + end for name in ("image", "audio", "video") for end in ("", "s"))
_CALLS = ("tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "reasoning")
# What a message may say of itself besides: whether it is an answer to learn from.
_LEARNT = ("weight", "train")
# Ids that tie a tool's result to its call mean nothing in a text.
_KNOWN = {*_ROLE_KEYS, *_TEXT_KEYS, *_CALLS, *_THOUGHTS, *_LEARNT, "tool_call_id"}
TOOLS_LEFT_OUT = "it uses tools, which are not text (--tools text writes them as text)"


class LeftOut(ValueError):
    """Why something of a row is no turn."""


class Message(NamedTuple):
    """One message; `learnt` is False for an answer that is not to be learnt from."""

    role: str
    text: str
    learnt: bool = True

    def plain(self) -> dict[str, str]:
        """As the trainer has it."""
        return {"role": self.role, "content": self.text}


class Turn(NamedTuple):
    """An answer with the messages before it; `number` counts the answers of a conversation, from 0."""

    number: int
    messages: list[dict[str, str]]
    answer: str


@dataclass
class Reader:
    """Makes turns of rows.

    Args:
        layout: where prompts and answers are.
        system: the column of system messages; None looks for the usual ones.
        text_cells: every value is text, as in CSV and Excel files, so that messages are written as JSON.
        last_only: of a conversation, only its last answer; otherwise all. Where answers have a column of their own,
            those in the prompt never are.
        tools_as_text: calls, results and definitions of tools are written out; otherwise what uses them is left out.
        thoughts_as_text: an answer's reasoning is put before it within <think>; otherwise it is not kept.

    `notes` counts the rows in which something was not kept, by what it is.
    """

    layout: Layout
    system: str | None = None
    text_cells: bool = False
    last_only: bool = False
    tools_as_text: bool = False
    thoughts_as_text: bool = False
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def several(self) -> bool:
        """Whether a row may become several."""
        return self.layout.format in (SHAREGPT, MESSAGES, ALPACA) and not self.last_only

    def used_columns(self, record: Mapping[str, Any]) -> set[str]:
        """The columns of a row that become messages and answers."""
        used = {self.layout.prompt, self.layout.answer, self._system_column(record)}
        if self.layout.format == ALPACA:
            used |= {*INPUTS, HISTORY}
        if self.tools_as_text and self.layout.format in (SHAREGPT, MESSAGES):
            used |= set(TOOLS)
        return {name for name in used if name is not None}

    def turns(self, record: Mapping[str, Any]) -> Iterator[Turn | tuple[int, str]]:
        """The turns of a row; in the place of one that cannot be used, its number and the reason.

        Raises:
            LeftOut: nothing of the row can be used.
        """
        media = next((name for name, value in record.items() if _is_media(name, value)), None)
        if media is not None:
            raise LeftOut(f"it has more than text (column {media!r})")
        notes: set[str] = set()
        tools = self._tools(record)
        messages = self._with_system(record, list(self._messages(record, notes)), tools)
        turns, trailing = self._answers(messages)
        yield from turns if self.several else turns[-1:]
        # What is asked last and not answered is said also where there are answers before.
        if trailing:
            yield len(turns), trailing
        self.notes.update(notes)

    # -- what a row has

    def _value(self, record: Mapping[str, Any], column: str) -> Any:
        """A column's value; messages that are written as JSON are unpacked, where text can be nothing else."""
        value = _value(record, column)
        layout = self.layout
        if self.text_cells or layout.format in (SHAREGPT, MESSAGES, VERL) or layout.prompt is None:
            inner = unpacked(value)
            return inner if is_conversation(inner) else value
        return value

    def _messages(self, record: Mapping[str, Any], notes: set[str]) -> Iterator[Message | LeftOut]:
        """All messages up to the last answer; one that cannot be used is a LeftOut, and is the last."""
        layout = self.layout
        if layout.format in (SHAREGPT, MESSAGES):
            yield from self._parsed(self._value(record, layout.prompt), layout.prompt, notes)
            return
        if layout.format == ALPACA:
            yield from self._history(record)
            yield Message(USER, _alpaca_prompt(record, layout.prompt))
        elif layout.prompt is not None:
            prompt = self._value(record, layout.prompt)
            if isinstance(prompt, str):
                yield Message(USER, prompt)
            elif isinstance(prompt, list):
                yield from self._parsed(prompt, layout.prompt, notes)
            else:
                kind = type(prompt).__name__
                raise LeftOut(f"{layout.prompt!r} is neither text nor a list of messages but {kind}")
        yield from self._answer(self._value(record, layout.answer), layout.answer, notes)

    def _answer(self, answer: Any, column: str, notes: set[str]) -> Iterator[Message | LeftOut]:
        if isinstance(answer, dict):
            answer = [answer]
        if isinstance(answer, list):
            for message in self._parsed(answer, column, notes):
                if isinstance(message, Message) and message.role != ASSISTANT and self.layout.prompt is not None:
                    raise LeftOut(f"the answer in {column!r} has a message of the {message.role!r} role")
                yield message
            return
        fault = fault_of_answer(answer, column)
        yield LeftOut(fault) if fault else Message(ASSISTANT, answer)

    def _history(self, record: Mapping[str, Any]) -> Iterator[Message]:
        history = unpacked(record.get(HISTORY)) or []
        if not isinstance(history, list):
            raise LeftOut(f"{HISTORY!r} is not a list of pairs but {type(history).__name__}")
        for pair in history:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
                raise LeftOut(f"{HISTORY!r} has something that is not a pair of texts")
            yield from (Message(USER, pair[0]), Message(ASSISTANT, pair[1]))

    def _parsed(self, items: Any, column: str, notes: set[str]) -> Iterator[Message | LeftOut]:
        if not isinstance(items, list):
            shown = "text" if isinstance(items, str) else type(items).__name__
            raise LeftOut(f"{column!r} is not a list of messages but {shown}")
        if not items:
            raise LeftOut(f"{column!r} has no messages")
        for item in items:
            try:
                yield self._message(item, notes)
            except LeftOut as reason:
                yield reason
                return

    def _message(self, item: Any, notes: set[str]) -> Message:
        if not isinstance(item, dict):
            raise LeftOut(f"a message is not an object but {type(item).__name__}")
        said = next((item[key] for key in _ROLE_KEYS if item.get(key) is not None), None)
        role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            raise LeftOut(f"a message has the role {said!r}" if said is not None else "a message has no role")
        notes.update(f"{key!r} of messages" for key, value in item.items() if key not in _KNOWN and _filled(value))
        calls = [item[key] for key in _CALLS if _filled(item.get(key))]
        if (calls or role in (TOOL, CALL)) and not self.tools_as_text:
            raise LeftOut(TOOLS_LEFT_OUT)
        text = _text_of(next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), None), bool(calls))
        if role == CALL:
            return Message(ASSISTANT, f"<tool_call>\n{text}\n</tool_call>")
        if role == ASSISTANT:
            text = self._with_thoughts(item, text, notes)
        for call in calls:
            text = "\n".join([*([text] if text else []), _calls_as_text(call)])
        learnt = all(item.get(key) is None or bool(item[key]) for key in _LEARNT)
        return Message(role, text, learnt)

    def _with_thoughts(self, item: Mapping[str, Any], text: str, notes: set[str]) -> str:
        thought = next((item[key] for key in _THOUGHTS if _filled(item.get(key))), None)
        if thought is None:
            return text
        if not self.thoughts_as_text:
            notes.add("the reasoning of answers (--reasoning think puts it before them)")
            return text
        if not isinstance(thought, str):
            raise LeftOut(f"the reasoning of an answer is not text but {type(thought).__name__}")
        return f"<think>\n{thought}\n</think>\n\n{text}"

    # -- what becomes of it

    def _answers(self, messages: list[Message | LeftOut]) -> tuple[list[Turn | tuple[int, str]], str | None]:
        """All turns, or why they are none; and why what follows the last one is not a turn."""
        turns: list[Turn | tuple[int, str]] = []
        asked = False
        for place, message in enumerate(messages):
            if isinstance(message, LeftOut):
                return [*turns, (len(turns), str(message))], None
            asked = asked or message.role == USER
            if message.role == ASSISTANT:
                before = [earlier.plain() for earlier in messages[:place]]
                reason = _reason(message, before, asked, self.layout.answer or self.layout.prompt)
                turns.append((len(turns), reason) if reason else Turn(len(turns), before, message.text))
        if messages[-1].role == ASSISTANT:
            return turns, None
        return turns, "it ends in a question without an answer" if turns else "there is no answer in it"

    def _with_system(
        self, record: Mapping[str, Any], messages: list[Message | LeftOut], tools: str | None
    ) -> list[Message | LeftOut]:
        """The messages behind the system message of its own column, with the tools that there are."""
        column = self._system_column(record)
        system = value_of(record, column) if column else None
        if system is not None and not isinstance(system, str):
            raise LeftOut(f"the system message in {column!r} is not text but {type(system).__name__}")
        first = messages[0] if messages else None
        inside = first.text if isinstance(first, Message) and first.role == SYSTEM else None
        if system and system.strip() and inside is not None and inside != system:
            raise LeftOut(f"it has two system messages, in {column!r} and in the conversation")
        text = system if system and system.strip() else inside
        if tools:
            text = "\n\n".join([*([text] if text else []), tools])
        if text is None:
            return messages
        return [Message(SYSTEM, text), *(messages if inside is None else messages[1:])]

    def _system_column(self, record: Mapping[str, Any]) -> str | None:
        return next((name for name in ((self.system,) if self.system else SYSTEMS) if has(record, name)), None)

    def _tools(self, record: Mapping[str, Any]) -> str | None:
        """The definitions of the tools that an answer may use, as text, or None."""
        tools = next((unpacked(record[name]) for name in TOOLS if _filled(unpacked(record.get(name)))), None)
        if tools is None or self.layout.format not in (SHAREGPT, MESSAGES):
            return None
        if not self.tools_as_text:
            raise LeftOut(TOOLS_LEFT_OUT)
        lines = [
            tool if isinstance(tool, str) else _json(tool) for tool in (tools if isinstance(tools, list) else [tools])
        ]
        return "\n".join(["# Tools", "", "<tools>", *lines, "</tools>"])


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _value(record: Mapping[str, Any], column: str) -> Any:
    """A column's value; LeftOut where there is none."""
    try:
        value = value_of(record, column)
    except KeyError:
        raise LeftOut(f"there is no {column!r} in it") from None
    if value is None:
        raise LeftOut(f"{column!r} is null")
    return value


def _reason(answer: Message, before: list[dict[str, str]], asked: bool, column: str) -> str | None:
    """Why this is no answer to learn from, or None."""
    if not answer.learnt:
        return "the answer is marked as not to be learnt from (weight or train)"
    if not asked:
        return "it begins with an answer that nobody asked for"
    if before[-1]["role"] in (USER, TOOL) and not before[-1]["content"].strip():
        return "the prompt is empty"
    return fault_of_messages(before, "content") or fault_of_answer(answer.text, column)


def _alpaca_prompt(record: Mapping[str, Any], column: str) -> str:
    """The instruction and, where there is one, its input below it."""
    instruction = _value(record, column)
    given = next((record[name] for name in INPUTS if has(record, name)), "")
    for name, text in ((column, instruction), ("input", given)):
        if not isinstance(text, str):
            raise LeftOut(f"{name!r} is not text but {type(text).__name__}")
    return f"{instruction}\n{given}" if given.strip() else instruction


def _text_of(content: Any, may_be_missing: bool) -> str:
    if content is None and may_be_missing:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LeftOut(f"a message's content is not text but {'null' if content is None else type(content).__name__}")
    return "\n".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise LeftOut(f"a message has a part of the type {kind!r}, which is not text")
    return part["text"]


def _calls_as_text(calls: Any) -> str:
    """Each call as {"name", "arguments"} within <tool_call>, as Hermes and Qwen write them."""
    shown = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LeftOut("a tool's call has no name")
        inner = {"name": function["name"], "arguments": unpacked(function.get("arguments"))}
        shown.append(f"<tool_call>\n{_json(inner)}\n</tool_call>")
    return "\n".join(shown)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_media(name: str, value: Any) -> bool:
    """Whether a column has pictures, sound or films: by its name, or as `datasets` stores them."""
    if isinstance(value, list) and value:
        return name in _MEDIA or _is_media(name, value[0])
    stored = isinstance(value, dict) and value.keys() == {"bytes", "path"}
    return (stored and any(value.values())) or (name in _MEDIA and _filled(value))


def _filled(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != "" and value != {}
