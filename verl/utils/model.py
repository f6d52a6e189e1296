"""Finding and loading models: a Hugging Face folder, or a checkpoint's `actor`/`critic` folder as training wrote it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from verl.utils.checkpoint.best_link import behind_best
from verl.utils.checkpoint.sharded import MODEL_FOLDER, read_full_tensors

logger = logging.getLogger(__name__)

Kind = Literal["policy", "score"]
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
AUTO_CLASSES: dict[Kind, type] = {"policy": AutoModelForCausalLM, "score": AutoModelForTokenClassification}


def quiet_transformers() -> None:
    """No loading bars and reports from transformers in this process: `load_model` checks what they would show."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts lie: the Hugging Face files, and the sharded weights if it is a checkpoint's."""

    huggingface: Path
    shards: Path | None


def find_model(path: str | Path) -> ModelSource:
    """Tell a Hugging Face folder from a checkpoint folder.

    Raises:
        FileNotFoundError: the folder is neither; says what was looked for, and what to pass instead where that can be
            seen (a whole `global_step_N` folder, for instance).
    """
    folder = behind_best(Path(path).expanduser())
    if (folder / "huggingface" / "config.json").is_file() and (folder / MODEL_FOLDER).is_dir():
        return ModelSource(folder / "huggingface", folder / MODEL_FOLDER)
    if (folder / "config.json").is_file():
        return ModelSource(folder, None)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist: give a local Hugging Face or checkpoint folder")
    inside = [name for name in ("actor", "critic") if (folder / name).is_dir()]
    hint = f"; did you mean {folder / inside[0]}?" if inside else ""
    raise FileNotFoundError(
        f"{folder} holds no model: expected config.json (Hugging Face) or huggingface/config.json and "
        f"{MODEL_FOLDER}/ (a checkpoint's actor or critic folder){hint}"
    )


def is_discriminator(path: str | Path) -> bool:
    """Whether the folder's model has a score head already."""
    config = json.loads((find_model(path).huggingface / "config.json").read_text())
    return any(name.endswith("ForTokenClassification") for name in config.get("architectures") or [])


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of one that has a tokenizer alone; ValueError if it has no EOS token, without
    which no answer ends.

    A missing pad token becomes the EOS token: masks never look at it.
    """
    folder = behind_best(Path(path).expanduser())
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        folder = find_model(path).huggingface
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


def load_config(
    path: str | Path, kind: Kind, override_config: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's Hugging Face config, without dropout, and with one label if it is to be a discriminator.

    Raises:
        ValueError: an override that the config does not have.
    """
    config = AutoConfig.from_pretrained(find_model(path).huggingface, trust_remote_code=trust_remote_code)
    for key, value in (override_config or {}).items():
        if not hasattr(config, key):
            raise ValueError(f"override_config.{key}: {type(config).__name__} has no such entry")
        setattr(config, key, value)
    for key, value in config.to_dict().items():
        # Old log-probs, scores and the update must see one and the same function.
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    if kind == "score":
        config.num_labels = 1
        config.classifier_dropout = 0.0
    return config


def load_model(
    path: str | Path,
    kind: Kind,
    override_config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    fresh_head: bool = True,
) -> PreTrainedModel:
    """The whole model on CPU. A language model read as a discriminator gets a fresh score head, unless `fresh_head` is
    false.

    Raises:
        ValueError: weights are missing (other than those of a fresh score head).
    """
    source = find_model(path)
    config = load_config(path, kind, override_config, trust_remote_code)
    auto = AUTO_CLASSES[kind]
    options = {"config": config, "dtype": dtype, "output_loading_info": True, "trust_remote_code": trust_remote_code}
    if source.shards is None:
        model, info = auto.from_pretrained(source.huggingface, **options)
    else:
        # The auto classes insist on a folder; the class they would pick does not.
        model_class = type(empty_model(config, kind, trust_remote_code))
        options.pop("trust_remote_code")
        model, info = model_class.from_pretrained(None, state_dict=read_full_tensors(source.shards), **options)
    generation_config = source.huggingface / "generation_config.json"
    if kind == "policy" and generation_config.is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.huggingface)
    may_miss = "score." if kind == "score" and fresh_head else ()
    missing = [key for key in info["missing_keys"] if not key.startswith(may_miss)]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, e.g. {sorted(missing)[:3]}")
    if info["missing_keys"]:
        logger.info("%s is a language model: the discriminator starts from it with a fresh score head", path)
    return model


def empty_model(
    config: PretrainedConfig, kind: Kind, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model on CPU with weights that nobody has set; its computed tables (rotary) are right, and in fp32."""
    with no_init_weights():
        model = AUTO_CLASSES[kind].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    # Tying happens in the initialisation that was left out.
    model.tie_weights()
    return model
