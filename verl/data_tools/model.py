"""What a model's folder says about texts: its tokenizer as training uses it, and its context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.models.finding import find_model
from verl.models.loading import context_length, load_config, quiet_transformers
from verl.models.tokenizer import all_eos_token_ids, find_tokenizer, load_tokenizer
from verl.utils.checkpoint.whole import refuse_pointers
from verl.utils.dataset.texts import SpecialText, Tokenization, eos_texts
from verl.utils.dataset.tokenizer_checks import check_tokenizer


def has_model(folder: str) -> bool:
    """Whether there is a model's config beside the tokenizer."""
    try:
        find_model(folder)
    except FileNotFoundError:
        return False
    return True


def find_tokenization(
    folder: str, template_kwargs: Mapping[str, Any], special_text: SpecialText, trust_remote_code: bool = False
) -> Tokenization:
    """How the model reads prompts and answers in training.

    Raises:
        FileNotFoundError, ValueError: there is no tokenizer, or it does not serve.
    """
    quiet_transformers()
    refuse_pointers(find_tokenizer(folder))
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_tokenizer(tokenizer, template_kwargs)
    ids = all_eos_token_ids(tokenizer, folder) if has_model(folder) else ()
    return Tokenization(tokenizer, template_kwargs, eos_texts(tokenizer, ids), special_text)


def context_of(folder: str, trust_remote_code: bool = False) -> int | None:
    """Tokens of the longest row that the model takes; None where nothing says it."""
    if not has_model(folder):
        return None
    return context_length(load_config(folder, "policy", trust_remote_code=trust_remote_code))
