"""Faults that keep a row from being used: of its fields, of its text, and of what the chat template makes of it.

Every function returns a sentence, or None where nothing is wrong. Sentences name no place in the text, so that equal
faults can be counted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.utils.command_line import called_as
from verl.utils.console import shorten
from verl.utils.dataset.texts import (
    SYSTEM_KEY,
    TOOLS_KEY,
    Conversation,
    Messages,
    conversation,
    render_prompt,
    tools_of,
)
from verl.utils.time_limit import at_most

logger = logging.getLogger(__name__)

# What data calls whoever answers.
ANSWERING_ROLES = frozenset({"assistant", "model", "gpt", "bot", "chatbot", "ai"})
# Deeper fields cannot be sent from one process to another.
MAX_DEPTH = 100
# Of one text: more than any model reads, and what takes minutes to tokenise.
MAX_CHARACTERS = 10_000_000
# For one prompt, of which a chat template makes thousands in this time.
TEMPLATE_SECONDS = 20
PROBE = "verl{}probe"
# What is said where a row is of another format, and so mostly is its whole file.
NO_COLUMN = "there is no column"
NO_LIST = "is not a list of chat messages"
NO_MESSAGE = "is not {role: text, content: text}"
# A tag such as <think>, [THINK] or ◁think▷ at the end of a prompt.
_CLOSING_TAG = re.compile(r"(?P<open><|\[|◁)(?P<slash>/?)(?P<name>[^<>\[\]◁▷\s/]{1,40})(?P<close>>|\]|▷)$")
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Fields


def fault_of_columns(record: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """A column that the row does not have, or None."""
    missing = next((key for key in keys if key not in record), None)
    return None if missing is None else f"{NO_COLUMN} {missing!r}, only {', '.join(map(repr, record))}"


def is_of_another_format(fault: str) -> bool:
    """Whether a fault is of columns or messages that are not there, and not of what stands in them."""
    return any(words in fault for words in (NO_COLUMN, NO_LIST, NO_MESSAGE))


def fault_of_text(text: str, name: str) -> str | None:
    """A text that is too long, or has half a surrogate pair, as broken emoji leave it, which tokenizers refuse."""
    if len(text) > MAX_CHARACTERS:
        return f"{name} has more than {MAX_CHARACTERS:,} characters, which no model reads: split it up"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{name} has half of a surrogate pair, U+{ord(text[error.start]):04X}, which is not a character"
    return None


def fault_of_messages(messages: Any, key: str) -> str | None:
    """The reason why `messages` is no conversation that an answer can follow, or None."""
    if not isinstance(messages, list):
        return f"{key!r} {NO_LIST} but {_what_instead(messages)}"
    if not messages:
        return f"{key!r} has no chat messages"
    for message in messages:
        instead = _no_message(message)
        if instead:
            return f"a message of {key!r} {NO_MESSAGE}: {instead}"
        role, content = message["role"], message["content"]
        fault = fault_of_text(role, f"a role of {key!r}") or fault_of_text(content, f"a message of {key!r}")
        if fault is None and len(message) > 2:
            fault = fault_of_depth(message, f"a message of {key!r}")
        if fault:
            return fault
    if messages[-1]["role"].lower() in ANSWERING_ROLES:
        return (
            f"{key!r} ends in a message of the {messages[-1]['role']!r} role, after which the student would have to "
            "answer itself: a prompt ends before the answer"
        )
    return None


def _what_instead(value: Any) -> str:
    if isinstance(value, dict):
        return "dict: put the one message into a list"
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        return f"str, a text of JSON: {called_as('verl.data_tools.convert')} makes messages of it"
    return type(value).__name__


def _no_message(message: Any) -> str | None:
    """What stands in a message's place, or None for {role: text, content: text}."""
    if not isinstance(message, dict):
        return f"it is {_type(message)}"
    missing = [name for name in ("role", "content") if name not in message]
    if missing:
        return f"it has no {' and no '.join(missing)}, only {shorten(', '.join(map(str, message)))}"
    if isinstance(message["content"], list):
        return "its content is a list of parts, and text alone is read"
    wrong = next((name for name in ("role", "content") if not isinstance(message[name], str)), None)
    return None if wrong is None else f"its {wrong} is {_type(message[wrong])}"


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def fault_of_conversation(messages: Any, record: Mapping[str, Any], key: str) -> str | None:
    """The reason why a row's messages, from column `key`, system message and tools are no conversation, or None."""
    fault = fault_of_messages(messages, key)
    if fault is None and record.get(SYSTEM_KEY) is not None:
        fault = _fault_of_system(record[SYSTEM_KEY], messages, key)
    if fault is None and record.get(TOOLS_KEY) is not None:
        fault = _fault_of_tools(record[TOOLS_KEY])
    return fault


def _fault_of_system(system: Any, messages: Messages, key: str) -> str | None:
    name = f"the column {SYSTEM_KEY!r}"
    if not isinstance(system, str):
        return f"{name} is not text but {type(system).__name__}"
    own = [message["content"] for message in messages if message["role"] == "system"]
    if system.strip() and own and own != [system]:
        return f"{name} and a message of {key!r} are both the system message, and differ: leave one of them out"
    return fault_of_text(system, name)


def _fault_of_tools(tools: Any) -> str | None:
    name = f"the column {TOOLS_KEY!r}"
    if isinstance(tools, str):
        if not tools.strip():
            return None
        fault = fault_of_text(tools, name)
        if fault:
            return fault
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            return f"{name} is not JSON: {error}"
    elif _has_null_fields(tools):
        return (
            f"{name} has fields that are null, as parquet makes them of tools with different fields, and the template "
            "would write them out: have the list as a text of JSON in this column"
        )
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return f"{name} is not a list of tools, or the JSON of one, but {_kind(tools)}"
    return fault_of_depth(tools, name)


def _has_null_fields(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _has_null_fields(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null_fields, value))


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return type(value).__name__
    return f"a list with {next(type(item).__name__ for item in value if not isinstance(item, dict))} in it"


def fault_of_answer(answer: Any, key: str) -> str | None:
    """The reason why `answer` is no text to learn from, or None."""
    if answer is None:
        return f"the answer in {key!r} is null"
    if not isinstance(answer, str):
        return f"the answer in {key!r} is not text but {type(answer).__name__}"
    return fault_of_text(answer, f"the answer in {key!r}") if answer.strip() else f"the answer in {key!r} is empty"


def fault_of_depth(value: Any, name: str) -> str | None:
    """Fields within fields, more than MAX_DEPTH deep, or None."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list | tuple):
                inner.extend(item)
        level = [item for item in inner if isinstance(item, dict | list | tuple)]
        if not level:
            return None
    return f"{name} is nested more than {MAX_DEPTH} levels deep"


# ---------------------------------------------------------------------------------------------------------------------
# What a chat template makes of them


class TemplateCheck:
    """A model's chat template, tried on rows.

    Args:
        tokenizer: whose template it is.
        template_kwargs: what it is given besides the messages.

    Attributes:
        open_thoughts: answers so far that are all within a thought that the template opens.
        prompt: the text of the last conversation of which one could be made.
        ignored_tools: conversations so far whose tools change nothing in the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs
        self.open_thoughts = 0
        self.prompt = ""
        self.ignored_tools = 0
        self._dropped: dict[tuple, str | None] = {}

    def fault(self, messages: Messages, answer: str | None = None) -> str | None:
        """Why no prompt can be made of sound messages, or not one for this answer."""
        try:
            with at_most(TEMPLATE_SECONDS, "a chat template"):
                prompt = self.prompt = render_prompt(self.tokenizer, self.template_kwargs, messages)
        except TimeoutError as error:
            # No row's fault, and the next one would take as long.
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not end: it was to make a prompt of one "
                f"conversation, and {error}; use another template"
            ) from error
        # A template is a program that came with the model, and fails in any way that programs do.
        except Exception as error:
            return f"the chat template refuses it ({type(error).__name__}: {error}){_null_fields(messages)}"
        if not prompt:
            return "the chat template makes an empty prompt of it"
        self.ignored_tools += self._ignores_tools(prompt, messages)
        fault = fault_of_text(prompt, "what the chat template makes of it")
        if fault:
            return fault
        dropped = self._dropped_role(messages)
        if dropped is not None:
            return (
                f"the chat template leaves out messages of the role {dropped!r} here, so the model would never see "
                "them: use roles that it knows (usually system, user, assistant)"
            )
        return None if answer is None else self._fault_of_beginning(prompt, messages, answer)

    def _ignores_tools(self, prompt: str, messages: Messages) -> bool:
        if not tools_of(messages):
            return False
        try:
            return render_prompt(self.tokenizer, self.template_kwargs, list(messages)) == prompt
        except Exception:
            # It needs the tools, so it does not ignore them.
            return False

    def _dropped_role(self, messages: Messages) -> str | None:
        """The role of the first message that does not reach the prompt; found once for each sequence of roles."""
        shape = tuple((message["role"], *(key for key, value in message.items() if value)) for message in messages)
        shape = (*shape, tools_of(messages) is not None)
        if shape not in self._dropped:
            self._dropped[shape] = self._probe(messages)
        return self._dropped[shape]

    def _probe(self, messages: Messages) -> str | None:
        probes = [PROBE.format(number) for number in range(len(messages))]
        probing = [message | {"content": probe} for message, probe in zip(messages, probes, strict=True)]
        tools = tools_of(messages)
        probing = Conversation(probing, tools) if tools else probing
        try:
            prompt = render_prompt(self.tokenizer, self.template_kwargs, probing)
        except Exception:
            # It asks for more of these texts than being texts; with the row's own it has worked.
            return None
        roles = (m["role"] for m, probe in zip(messages, probes, strict=True) if m["content"] and probe not in prompt)
        return next(roles, None)

    def _fault_of_beginning(self, prompt: str, messages: Messages, answer: str) -> str | None:
        """An answer that begins with the tag that the template has put at the prompt's end already."""
        end, last = prompt.rstrip(), messages[-1]["content"].strip()
        tag = _CLOSING_TAG.search(end[-50:])
        if tag is None or (last and end.endswith(last)):
            return None
        opening = "{open}{name}{close}".format(**tag.groupdict())
        begins = answer.lstrip().startswith((tag[0], opening))
        if begins and (not tag["slash"] or _THOUGHT.search(tag["name"])):
            what = "closes" if tag["slash"] else "opens"
            return (
                f"the chat template {what} {opening} at the end of the prompt, and the answer begins with {opening} "
                "too: take it off the answers, or choose another template"
            )
        if not tag["slash"] and _THOUGHT.search(tag["name"]):
            self.open_thoughts += "{open}/{name}{close}".format(**tag.groupdict()) not in answer
        return None


def fault_of_row(
    record: Mapping[str, Any], prompt_key: str, response_key: str, template: TemplateCheck | None
) -> str | None:
    """Why a row cannot be used, or None.

    Args:
        template: the model's; without one, what it would refuse is not found.
    """
    fault = fault_of_columns(record, (prompt_key, response_key))
    if fault:
        return fault
    messages, answer = record[prompt_key], record[response_key]
    return (
        fault_of_conversation(messages, record, prompt_key)
        or fault_of_answer(answer, response_key)
        or fault_of_depth(record.get("extra_info"), "'extra_info'")
        or (template.fault(conversation(messages, record), answer) if template else None)
    )


def warn_of_ignored_tools(ignored: int, rows: int) -> None:
    """Say, if there are any, that tools of so many of the rows do not reach the prompt."""
    if ignored:
        logger.warning(
            "the chat template ignores tools: those in the column %r of %d of %d rows change nothing in the prompts, "
            "so the model is not told of them; use a model or a template that knows tools, or leave the column out",
            TOOLS_KEY, ignored, rows,
        )  # fmt: skip


def _null_fields(messages: Messages) -> str:
    names = sorted({key for message in messages for key, value in message.items() if value is None})
    return f"; its messages have fields that are null: {', '.join(names)}" if names else ""
