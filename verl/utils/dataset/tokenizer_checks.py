"""Checks that a tokenizer serves: it has what prompts and answers need, and makes the ids that its files say."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.texts import Messages, render_prompt

# Numbers, spaces, case, apostrophes, code, scripts: what pre-tokenizers tell apart.
SAMPLE = (
    "In 2023 there were 650841 people, 3.14159 of them (1,000,000.5%) HERE; it's what they'd've said: CAN'T!",
    "def f(x):\n    return {'a': x[0], \"b\": x**2}  # done\n\n\n\tif x != 1: pass\r\n",
    "  two  spaces   before words, and after  ",
    "在2023年，有650841个人说：“你好！”红色的苹果。今日は良い天気です。안녕하세요 мир naïve café 👍🏽 x²",
    "https://example.org/a_b-c?d=e&f=%20g snake_case camelCase 0x1F 1e-5",
)
# What the trainer itself passes to apply_chat_template.
OWN_ARGUMENTS = frozenset({"conversation", "add_generation_prompt", "tokenize", "return_dict"})
_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(rf"{_CLOCK}\s*\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
    """ValueError for a tokenizer without a chat template or an EOS token, one that makes other ids than its
    tokenizer.json, and arguments that its template does not know."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: use the model's chat (instruct) version, "
            "or put a chat_template into its tokenizer files"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no answer could end")
    check_template_kwargs(tokenizer, template_kwargs or {})
    check_ids(tokenizer)


def check_template_kwargs(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """ValueError for an argument that the trainer sets itself, or whose name does not even occur in the template."""
    if not template_kwargs:
        return
    template = _template(tokenizer, template_kwargs)
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
    words = set(re.findall(r"\w+", template))
    for name in template_kwargs:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"apply_chat_template_kwargs.{name} is set by the trainer itself: leave it out")
        if name not in words and name not in arguments:
            close = difflib.get_close_matches(name, words, n=1, cutoff=0.75)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"apply_chat_template_kwargs.{name}: the chat template of {tokenizer.name_or_path!r} has no such "
                f"variable, so it would have no effect{hint}"
            )


def arguments_for(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments made for another model's chat template, those whose names occur in this tokenizer's; another
    template never is."""
    kept = {name: value for name, value in template_kwargs.items() if name != "chat_template"}
    words = set(re.findall(r"\w+", _template(tokenizer, kept)))
    return {name: value for name, value in kept.items() if name in words}


def check_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str]] = ()) -> None:
    """ValueError if a tokenizer from a folder makes other ids of a text than the tokenizer.json in it.

    transformers may build a tokenizer anew by the name of its class, with that class's idea of how a text is split; the
    model was trained on tokenizer.json's.

    Args:
        texts: pairs of a text and the place it comes from, for the message; some made-up text is always tried.
    """
    file = Path(tokenizer.name_or_path or "-") / "tokenizer.json"
    if not file.is_file():
        return
    expected = Tokenizer.from_file(str(file))
    expected.no_truncation()
    expected.no_padding()
    added = sorted(tokenizer.get_added_vocab())
    for text, place in [*((text, "a text like any") for text in SAMPLE), *texts]:
        if any(token in text for token in added):
            continue  # Which of these there are is also said in other files.
        got = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = expected.encode(text, add_special_tokens=False).ids
        if got != wanted:
            raise ValueError(
                f"the tokenizer that transformers loads from {file.parent} ({type(tokenizer).__name__}) is not the one "
                f"in its {file.name}: of {place}, {_around(text, tokenizer, got, wanted)}. The model would read other "
                "tokens than it was trained on: copy the tokenizer's files, without the model's config.json, into a "
                'folder of their own, say "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, '
                "and pass it as actor_rollout_ref.model.tokenizer_path; or use another version of transformers"
            )


def _around(text: str, tokenizer: PreTrainedTokenizerBase, got: list[int], wanted: list[int]) -> str:
    """The text around the first token in which two readings of it differ."""
    pairs = enumerate(zip(got, wanted, strict=False))
    same = next((number for number, pair in pairs if pair[0] != pair[1]), min(len(got), len(wanted)))
    start = max(0, same - 2)
    pieces = [tokenizer.convert_ids_to_tokens(ids[start : same + 4]) for ids in (got, wanted)]
    return f"{text[:40]!r}..., it makes {len(got)} tokens, not {len(wanted)} ({pieces[0]}, not {pieces[1]})"


def tells_the_time(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> bool:
    """Whether the chat template can ask for the date or the time."""
    return _CLOCK in _template(tokenizer, template_kwargs)


def _template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> str:
    return tokenizer.get_chat_template(template_kwargs.get("chat_template"), template_kwargs.get("tools"))


def dated_prompt(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], messages: Messages
) -> str | None:
    """The date or time that the chat template writes into this prompt, or None; "the date" if its form is not known."""
    if not tells_the_time(tokenizer, template_kwargs):
        return None
    template = _template(tokenizer, template_kwargs)
    forms = [single or double for single, double in _CLOCK_CALL.findall(template)]
    before = [datetime.now().strftime(form) for form in forms]
    prompt = render_prompt(tokenizer, template_kwargs, messages)
    after = [datetime.now().strftime(form) for form in forms]
    found = next((text for text in [*before, *after] if text in prompt), None)
    unknown = len(forms) < template.count(f"{_CLOCK}(") or not forms
    return found or ("the date" if unknown else None)
