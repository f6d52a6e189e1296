"""The Hugging Face files beside a model's weights: what the base model's say, and what training changed of it.

The base's files are taken as they are read before training, and written with every checkpoint and merged model. So what
other programs and versions read in them stays where they look for it: the tokenizer's files byte for byte, entries of
config.json under their old names, and values that only training sets otherwise, as dropout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model",
    "*.tiktoken", "tekken.json",
)  # fmt: skip
# Said of the file or of the process, not of the model.
NOT_THE_MODELS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def is_dropout(key: str) -> bool:
    """Whether a config's entry is a rate of dropout, which training switches off."""
    return "dropout" in key or "pdrop" in key


@dataclass(frozen=True)
class HuggingFaceFiles:
    """A model folder's files as they stand, and its config as transformers reads it."""

    config: dict[str, Any]
    as_read: dict[str, Any]
    generation_config: bytes | None
    tokenizer: dict[str, bytes]
    # The model's own, if its config names any.
    code: dict[str, bytes]

    @classmethod
    def read(cls, model: Path, tokenizer: Path, trust_remote_code: bool = False) -> HuggingFaceFiles:
        """The files of two Hugging Face folders, which may be one."""
        generation = model / GENERATION_CONFIG
        return cls(
            config=json.loads((model / CONFIG).read_text(encoding="utf-8")),
            as_read=_entries(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)),
            generation_config=generation.read_bytes() if generation.is_file() else None,
            tokenizer=_tokenizer_files(tokenizer),
            code=_code(model),
        )


def _code(model: Path) -> dict[str, bytes]:
    if "auto_map" not in json.loads((model / CONFIG).read_text(encoding="utf-8")):
        return {}
    return {str(file.relative_to(model)): file.read_bytes() for file in _matching(model, ("*.py", "*/*.py"))}


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    config = folder / "tokenizer_config.json"
    files = _matching(folder, TOKENIZER_FILES)
    if config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        # Its class is in the folder too.
        files += _matching(folder, ("*.py",))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def write_hf_files(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    base: HuggingFaceFiles | None,
) -> None:
    """Write config.json, generation_config.json (of a language model) and the tokenizer's files of a trained model.

    The tokenizer's EOS, with which answers were trained to end, is among those that end generation in either file.

    Args:
        dtype: of the weights beside them.
        base: what the model was trained from; None where it came from no folder.
    """
    folder = Path(folder)
    # Brings the config's own code along, if it has any.
    model.config.save_pretrained(folder)
    entries = json.loads(model.config.to_json_string()) if base is None else _trained_entries(base, model.config)
    entries["architectures"] = [type(model).__name__]
    entries["dtype"] = entries["torch_dtype"] = str(dtype).removeprefix("torch.")
    entries["eos_token_id"] = with_eos(entries.get("eos_token_id"), tokenizer.eos_token_id)
    if hasattr(model.config, "tie_word_embeddings"):
        # Said even where it is the default: versions have different ones.
        entries["tie_word_embeddings"] = model.config.tie_word_embeddings
    _write_json(folder / CONFIG, entries | names_of_version_4(entries))
    if getattr(model, "generation_config", None) is not None:
        _write_generation_config(folder / GENERATION_CONFIG, model, tokenizer, base)
    if base is None:
        tokenizer.save_pretrained(folder)
        return
    for file in _matching(folder, TOKENIZER_FILES):
        # Another tokenizer's, of an earlier model in the same folder, would be read beside these.
        file.unlink()
    for name, content in (base.code | base.tokenizer).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _write_generation_config(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: HuggingFaceFiles | None
) -> None:
    if base is not None and base.generation_config is not None:
        file.write_bytes(base.generation_config)
    else:
        # As it is: saving through transformers would refuse settings that loading accepts.
        model.generation_config.to_json_file(file)
    entries = json.loads(file.read_text(encoding="utf-8"))
    eos = with_eos(entries.get("eos_token_id"), tokenizer.eos_token_id)
    if eos != entries.get("eos_token_id"):
        _write_json(file, entries | {"eos_token_id": eos})


def with_eos(named: int | list[int] | None, eos: int) -> int | list[int]:
    """The tokens that end generation, with `eos` among them and first if it was not."""
    if named is None:
        return eos
    tokens = named if isinstance(named, list) else [named]
    return named if eos in tokens else [eos, *tokens]


def _trained_entries(base: HuggingFaceFiles, config: PretrainedConfig) -> dict[str, Any]:
    """The base's entries, with what differs now from what was read from them; dropout is as it was."""
    now = _entries(config)
    changed = {
        key: value
        for key, value in now.items()
        if (key not in base.as_read or base.as_read[key] != value)
        and key not in NOT_THE_MODELS
        and not (is_dropout(key) and key in base.as_read)
    }
    entries = base.config | changed
    if "rope_parameters" in changed:
        # What other names say of it is of the base.
        for key in ROPE_NAMES_OF_VERSION_4:
            entries.pop(key, None)
    return entries


def _entries(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _write_json(file: Path, entries: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What version 4 of transformers calls an entry of the config, or of its rope_parameters, by model_type: of all causal
# language models that both versions know, these and Gemma 3's local frequency are the ones with another name.
OTHER_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
ROPE_NAMES_OF_VERSION_4 = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
)  # fmt: skip


def names_of_version_4(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that transformers 4, and code written for it, looks for under other names than version 5 has; without
    them it takes defaults silently. Entries that are there already are left out."""
    wanted = _rope_names(entries.get("rope_parameters") or {})
    for key, name in OTHER_NAMES.get(entries.get("model_type"), {}).items():
        known = wanted | entries
        if key in known:
            wanted[name] = known[key]
    return {key: value for key, value in wanted.items() if key not in entries}


def _rope_names(rope: Mapping[str, Any]) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    if "full_attention" in rope or "sliding_attention" in rope:
        # By kind of layer (Gemma 3): that of full attention is the main one.
        local, rope = rope.get("sliding_attention"), rope.get("full_attention") or rope["sliding_attention"]
        if local is not None:
            wanted["rope_local_base_freq"] = local["rope_theta"]
    wanted |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return wanted | _rope_scaling(rope)


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "longrope":
        # Version 4 insists on these three and has the original length at the top.
        scaling = {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}}
        original = rope.get("original_max_position_embeddings")
        top = {} if original is None else {"original_max_position_embeddings": original}
        return {"rope_scaling": scaling, **top}
    return {"rope_scaling": {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}}
