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
from verl.utils.checkpoint.hf_files import HuggingFaceFiles, is_dropout
from verl.utils.checkpoint.sharded import MODEL_FOLDER, read_full_tensors
from verl.utils.checkpoint.whole import check_huggingface, check_part, refuse_pointer

logger = logging.getLogger(__name__)

Kind = Literal["policy", "score"]
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


def check_files(path: str | Path, contents: bool = True) -> None:
    """See that a model folder is whole before it is used.

    Of a checkpoint's folder, shards are counted and everything that a model is read from is compared with its
    checksums, once per process; `contents=False` leaves the contents out. Of a Hugging Face folder, the weights that it
    names have to be there, and whole by their own account.

    Raises:
        FileNotFoundError, ValueError: names the file that is missing, damaged, not this checkpoint's or a Git LFS
            pointer.
    """
    source = find_model(path)
    if source.shards is None:
        check_huggingface(source.huggingface)
    else:
        check_part(source.shards.parent, contents)


def hf_files(
    path: str | Path, tokenizer_path: str | Path | None = None, trust_remote_code: bool = False
) -> HuggingFaceFiles:
    """The Hugging Face files of a model folder, with the tokenizer's of another one if that is given."""
    tokenizer = find_model(tokenizer_path or path).huggingface
    return HuggingFaceFiles.read(find_model(path).huggingface, tokenizer, trust_remote_code)


def config_entries(path: str | Path) -> dict[str, Any]:
    """What the folder's config.json says; ValueError names a damaged one."""
    file = find_model(path).huggingface / "config.json"
    refuse_pointer(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON, got {error}") from error


def is_discriminator(path: str | Path) -> bool:
    """Whether the folder's model has a score head already."""
    config = config_entries(path)
    return any(name.endswith("ForTokenClassification") for name in config.get("architectures") or [])


def refuse_discriminator(path: str | Path) -> None:
    """ValueError for a discriminator where a language model belongs, which may miss none of its weights."""
    if is_discriminator(path):
        raise ValueError(
            f"{path} holds a discriminator, and a language model is wanted here: pass a checkpoint's actor folder, or "
            "a Hugging Face folder of a language model"
        )


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; ValueError if it has no EOS token, without which no answer ends.

    A missing pad token becomes the EOS token: masks never look at it.
    """
    tokenizer = AutoTokenizer.from_pretrained(find_model(path).huggingface, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {path} has no eos_token: answers could not end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        if is_dropout(key) and isinstance(value, float):
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
        FileNotFoundError, ValueError: the folder is not whole (`check_files`), weights are missing (other than those of
            a fresh score head), or a discriminator is to be a language model.
    """
    check_files(path)
    if kind == "policy":
        refuse_discriminator(path)
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
