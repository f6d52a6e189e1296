"""Chat messages and answers as token ids, the same for training, scoring and judging.

Special tokens stand where the chat template puts them and where an answer ends, and nowhere else: a text in which the
name of one occurs ("the token <|im_end|> ends a turn") is read as the letters that it is, unless it is asked for
otherwise. A user's message could close its own turn, and a teacher's answer would teach to go on after its end.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from transformers import AddedToken, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
# Columns beside the messages that belong to a conversation, if a row has them.
SYSTEM_KEY, TOOLS_KEY = "system", "tools"
# What becomes of a special token's name in a text: the letters that it is, or the token.
SpecialText = Literal["text", "token"]

# Around the number of a special token: noncharacters, which no text has. One pair stands for the template's own tokens,
# the other hides the texts' from the template.
_TOKEN, _HIDDEN = "\ufdd0{}\ufdd1", "\ufdd2{}\ufdd3"

# Arguments of apply_chat_template that change the ids, and not the text.
_OF_TOKENS = frozenset(
    {"padding", "truncation", "max_length", "return_tensors", "tokenizer_kwargs", "return_assistant_tokens_mask",
     "sanitize_control_tokens"}
)  # fmt: skip


class _Specials(NamedTuple):
    """The special tokens of a tokenizer: their names and ids, and what finds them in a text."""

    ids: dict[str, int]
    first_letters: frozenset[str]
    pattern: re.Pattern[str]


@lru_cache(maxsize=8)
def _specials(tokenizer: PreTrainedTokenizerBase) -> _Specials:
    ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The longest first, as a token may be the beginning of another. Without any, nothing matches.
    names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    return _Specials(ids, frozenset(name[0] for name in ids), re.compile(names or r"(?!)"))


def special_names(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, int]:
    """The special tokens whose names occur in a text, with their ids."""
    specials = _specials(tokenizer)
    # Most texts do not even have a first letter, which is quickly seen.
    if not any(letter in text for letter in specials.first_letters):
        return {}
    return {name: specials.ids[name] for name in specials.pattern.findall(text)}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


class Conversation(list[dict[str, Any]]):
    """Chat messages, and the tools that may be called, which the chat template is given too."""

    def __init__(self, messages: Iterable[dict[str, Any]], tools: list[dict[str, Any]]):
        super().__init__(messages)
        self.tools = tools


def conversation(messages: Messages, record: Mapping[str, Any]) -> Messages:
    """The messages of a row in which nothing is wrong (`faults.fault_of_conversation`), with its system message before
    them if it has one in a column of its own, and its tools."""
    system, tools = record.get(SYSTEM_KEY), record.get(TOOLS_KEY)
    if system and system.strip() and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    return Conversation(messages, tools) if tools and not isinstance(tools, str) else messages


def tools_of(messages: Messages) -> list[dict[str, Any]] | None:
    """The tools of a conversation, if it has any."""
    return messages.tools if isinstance(messages, Conversation) else None


def _arguments(template_kwargs: Mapping[str, Any], messages: Messages) -> dict[str, Any]:
    """What the template is given besides the messages: a row's tools take the place of the settings'."""
    tools = tools_of(messages)
    return {**template_kwargs, **({"tools": tools} if tools else {})}


def conversation_texts(messages: Messages) -> list[str]:
    """All text of a conversation that the data's author wrote: contents, and tools as JSON."""
    tools = tools_of(messages)
    return [*(message["content"] for message in messages), *([json.dumps(tools, ensure_ascii=False)] if tools else [])]


def render_prompt(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], messages: Messages) -> str:
    """The text of a conversation up to where the answer begins; raises whatever the template does."""
    arguments = _arguments(template_kwargs, messages)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    conversations: Sequence[Messages],
    special_text: SpecialText = "text",
    rendered: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation up to where the answer begins; `rendered`: their texts, if they are there
    already."""
    if rendered is not None and _tokenizes_what_it_renders(tokenizer, template_kwargs):
        ids = tokenizer(list(rendered), add_special_tokens=False)["input_ids"]
    elif any(map(tools_of, conversations)):
        # One call takes one list of tools.
        ids = [
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False,
                **_arguments(template_kwargs, messages),
            )
            for messages in conversations
        ]  # fmt: skip
    else:
        ids = tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=True, return_dict=False, **template_kwargs
        )
    if special_text == "text":
        for number, messages in enumerate(conversations):
            if any(special_names(tokenizer, text) for text in conversation_texts(messages)):
                ids[number] = _without_special_text(tokenizer, template_kwargs, messages)
    return ids


def _tokenizes_what_it_renders(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether a prompt's ids are those of its text, with no more to it: no method or argument of its own."""
    usual = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    return usual and _OF_TOKENS.isdisjoint(template_kwargs)


class _Twin(NamedTuple):
    """A copy of a tokenizer that knows each special token by another name too, and its ids in the tokenizer's."""

    tokenizer: PreTrainedTokenizerBase
    original: dict[int, int]


@lru_cache(maxsize=2)
def _twin(tokenizer: PreTrainedTokenizerBase) -> _Twin:
    twin = copy.deepcopy(tokenizer)
    known = tokenizer.added_tokens_decoder
    names = {}
    for number, index in enumerate(_specials(tokenizer).ids.values()):
        # Not special, as special ones are what is to be read as text.
        options = {"lstrip": known[index].lstrip, "rstrip": known[index].rstrip, "normalized": False, "special": False}
        names[_TOKEN.format(number)] = index
        twin.add_tokens([AddedToken(_TOKEN.format(number), **options)])
    return _Twin(twin, {twin.convert_tokens_to_ids(name): index for name, index in names.items()})


def _without_special_text(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], messages: Messages
) -> list[int]:
    """Ids of a conversation in which the template's special tokens are tokens, and those of its texts are text."""
    specials, twin = _specials(tokenizer), _twin(tokenizer)
    numbers = {name: number for number, name in enumerate(specials.ids)}
    names = list(specials.ids)

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return specials.pattern.sub(lambda match: _HIDDEN.format(numbers[match[0]]), value)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, list) else value

    hidden, tools = hide(messages), tools_of(messages)
    if tools:
        # As one text, because names of their fields are the author's as well.
        hidden = Conversation(hidden, json.loads(hide(json.dumps(tools, ensure_ascii=False))))
    prompt = render_prompt(tokenizer, template_kwargs, hidden)
    prompt = specials.pattern.sub(lambda match: _TOKEN.format(numbers[match[0]]), prompt)
    prompt = re.sub(_HIDDEN.format(r"(\d+)"), lambda match: names[int(match[1])], prompt)
    ids = twin.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [twin.original.get(index, index) for index in ids]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def eos_texts(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()) -> tuple[str, ...]:
    """The texts that may end an answer: the name of the tokenizer's EOS, and those of the model's others.

    A model may also count a word as an end; as text that is a word.
    """
    names = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    others = [names[index] for index in eos_token_ids if index in names]
    return tuple(dict.fromkeys([tokenizer.eos_token, *others]))


def without_eos_text(text: str, eos_token: str | Sequence[str]) -> str:
    """An answer without the text of an EOS, any of several, or several, at its end, and the white space around them."""
    tokens = (eos_token,) if isinstance(eos_token, str) else tuple(eos_token)
    end = text.rstrip()
    while end.endswith(tokens):
        text = end = end.removesuffix(next(token for token in tokens if end.endswith(token))).rstrip()
    return text


def tokenize_answers(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ends: Sequence[str] | None = None,
    special_text: SpecialText = "text",
) -> list[list[int]]:
    """Token ids of each answer with one EOS at its end, the tokenizer's, also where the text ends in the text of an EOS
    itself: one of `ends` (`eos_texts`), or, without them, the tokenizer's."""
    texts = [without_eos_text(text, ends or tokenizer.eos_token) for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=special_text == "text")["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in ids]


# ---------------------------------------------------------------------------------------------------------------------
# Both


@dataclass(frozen=True)
class Tokenization:
    """How a model reads prompts and answers.

    tokenizer: has a chat template and an EOS token.
    template_kwargs: arguments of the template besides the messages.
    ends: texts that an answer may end in (`eos_texts`); None is the tokenizer's EOS alone.
    special_text: what a special token's name in a text is.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ends: Sequence[str] | None = None
    special_text: SpecialText = "text"

    def prompts(self, conversations: Sequence[Messages], rendered: Sequence[str] | None = None) -> list[list[int]]:
        """Token ids of each conversation, see `tokenize_prompts`."""
        return tokenize_prompts(self.tokenizer, self.template_kwargs, conversations, self.special_text, rendered)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer with EOS, see `tokenize_answers`."""
        return tokenize_answers(self.tokenizer, texts, self.ends, self.special_text)
