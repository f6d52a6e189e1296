"""A model's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from verl.models.finding import find_model
from verl.models.folders import refuse_no_tokenizer, told_of
from verl.utils.checkpoint.best_link import behind_best

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def find_tokenizer(path: str | Path) -> Path:
    """The folder that a tokenizer's files are in: this one, or that of the model in it (`find_model`)."""
    folder = behind_best(Path(path).expanduser())
    has_files = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return folder if has_files else find_model(path).huggingface


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of one that has a tokenizer alone; ValueError if it has no EOS token, without
    which no answer ends.

    A missing pad token becomes the EOS token: masks never look at it.
    """
    folder = find_tokenizer(path)
    refuse_no_tokenizer(folder)
    with told_of(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {path} has no eos_token: answers could not end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def all_eos_token_ids(tokenizer: PreTrainedTokenizerBase, model: str | Path | PretrainedConfig) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS first, which is the one that teachers' answers are closed
    with, then the others of the model.

    Whatever asks whether an answer ended (engines, scores, rewards, metrics, the judge) asks with these ids.

    Args:
        model: a folder, of which generation_config.json counts, or config.json where that names none, as in
            transformers' own generation; or a config: of the folder it was loaded from, or without one its own entry.
    """
    if isinstance(model, PretrainedConfig):
        own = getattr(model.get_text_config(), "eos_token_id", None)
        model = model.name_or_path
    else:
        own, model = None, find_model(model).huggingface
    for name in ("config.json", "generation_config.json"):
        file = Path(model or "-") / name
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        named = entries.get("eos_token_id", entries.get("text_config", {}).get("eos_token_id"))
        own = own if named is None else named
    others = [] if own is None else own if isinstance(own, list) else [own]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *others]))
