"""Loading models from the folders that `finding.py` knows: their configs, whole models (of adapters the merged one) and
empty ones; and what can be told of them before: class, heads, labels."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from verl.models.adapter_folders import AdapterFolder
from verl.models.adapters import add_adapters, config_in, load_adapters, merge_adapters
from verl.models.answer_models import SCORE_HEADS, score_head, score_head_name
from verl.models.finding import (
    base_of,
    check_files,
    config_entries,
    find_model,
    is_discriminator,
    refuse_discriminator,
)
from verl.models.folders import told_of
from verl.models.four_bit import require_bitsandbytes, round_to_4bit
from verl.models.reward_models import (
    head_renaming,
    is_reward_model,
    labels_of,
    refuse_more_than_a_head,
    refuse_other_rewards,
    settled_bias,
)
from verl.models.score_classes import register_own_score_class, register_score_class
from verl.models.tokenizer import find_tokenizer
from verl.utils.checkpoint.hf_files import HuggingFaceFiles, is_dropout
from verl.utils.checkpoint.sharded import read_full_tensors

Kind = Literal["policy", "score"]
AUTO_CLASSES: dict[Kind, type] = {"policy": AutoModelForCausalLM, "score": AutoModelForTokenClassification}


def quiet_transformers() -> None:
    """No loading bars and reports from transformers in this process: `load_model` checks what they would show."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def hf_files(
    path: str | Path, tokenizer_path: str | Path | None = None, trust_remote_code: bool = False
) -> HuggingFaceFiles:
    """The Hugging Face files of a model folder, with the tokenizer's of another one if that is given."""
    tokenizer = find_tokenizer(tokenizer_path or path)
    return HuggingFaceFiles.read(find_model(path).huggingface, tokenizer, trust_remote_code)


def load_config(
    path: str | Path, kind: Kind, override_config: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's Hugging Face config, without dropout, and with one label if it is to be a discriminator.

    Raises:
        ValueError: an override that the config does not have.
    """
    folder = find_model(path).huggingface
    with told_of(folder, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if override_config:
        config = _overridden(config, json.loads((folder / "config.json").read_text()), dict(override_config))
    for key, value in config.to_dict().items():
        # Old log-probs, scores and the update must see one and the same function.
        if is_dropout(key) and isinstance(value, float):
            setattr(config, key, 0.0)
    if kind == "score":
        as_discriminator(config, trust_remote_code)
    return config


def as_discriminator(config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """The config, changed in place to that of a score head with one label; the family has a class for it from then on
    if it can have one."""
    config.num_labels = 1
    config.classifier_dropout = 0.0
    if trust_remote_code:
        register_own_score_class(config)
    register_score_class(type(config))


def _overridden(config: PretrainedConfig, entries: dict[str, Any], changes: dict[str, Any]) -> PretrainedConfig:
    """The config that `entries`, those of its file, make with `changes`. Kinds of layers that only repeat what follows
    from the other entries follow from the changed ones."""
    for key in changes:
        if not hasattr(config, key):
            raise ValueError(f"override_config.{key}: {type(config).__name__} has no such entry")
    if "layer_types" in entries and "layer_types" not in changes:
        others = {key: value for key, value in entries.items() if key != "layer_types"}
        if type(config).from_dict(others).layer_types == config.layer_types:
            entries = others
    changed = type(config).from_dict({**entries, **changes})
    # Where the model was found: code that came with it is looked for there.
    changed.name_or_path = config.name_or_path
    return changed


def load_model(
    path: str | Path,
    kind: Kind,
    override_config: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    fresh_head: bool = True,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """The whole model on CPU, adapters merged. A language model read as a discriminator gets a fresh score head, unless
    `fresh_head` is false. `config`: in the place of that which the folder and `override_config` make.

    Raises:
        FileNotFoundError, ValueError: the folder is not whole (`check_files`), or a discriminator is to be a language
            model; weights are missing (other than those of a fresh score head), the score head has several labels, or
            the LM head is not the embedding though the config says so.
    """
    check_files(path)
    if kind == "policy":
        refuse_discriminator(path)
    source = find_model(path)
    if source.adapter is not None:
        return _merged(path, source.adapter, kind, override_config, trust_remote_code, dtype, fresh_head)
    if kind == "score":
        check_labels(path)
    if config is None:
        config = load_config(path, kind, override_config, trust_remote_code)
    auto = AUTO_CLASSES[kind]
    options = {"config": config, "dtype": dtype, "output_loading_info": True, "trust_remote_code": trust_remote_code}
    rewards = kind == "score" and is_reward_model(config_entries(path))
    if rewards:
        with torch.device("meta"):
            head = score_head_name(empty_model(config, kind, trust_remote_code))
        options["key_mapping"] = head_renaming(head)
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
    missing = set(info["missing_keys"])
    if rewards:
        refuse_more_than_a_head(path, info["unexpected_keys"])
        missing -= settled_bias(path, score_head(model), head, missing)
    _check_missing(path, model, missing, fresh_head=kind == "score" and fresh_head and not rewards)
    if kind == "policy" and is_tied(config) and not shares_embedding(model):
        raise ValueError(untied_head(path))
    return model


def _check_missing(path: str | Path, model: PreTrainedModel, names: Collection[str], fresh_head: bool) -> None:
    """ValueError if weights were not found, those of a fresh score head apart."""
    head = tuple(f"{name}." for name in SCORE_HEADS) if fresh_head else ()
    missing = sorted(name for name in names if not name.startswith(head))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[:3]}")


def _merged(
    path: str | Path,
    adapter: AdapterFolder,
    kind: Kind,
    override_config: Mapping[str, Any] | None,
    trust_remote_code: bool,
    dtype: torch.dtype,
    fresh_head: bool,
) -> PreTrainedModel:
    """`load_model` of a folder of adapters: base and adapters as one plain model, with the config of the latter."""
    fresh_head |= adapter.scores
    own = load_config(path, kind, override_config, trust_remote_code)
    in_4bit = adapter.base_dtype
    if in_4bit is not None:
        require_bitsandbytes(f"{path}, adapters that were trained beside weights in 4 bits,")
    read = dtype if in_4bit is None else torch.float32
    model = load_model(adapter.base, kind, None, trust_remote_code, read, fresh_head, own)
    if in_4bit is not None:
        round_to_4bit(model, getattr(torch, in_4bit))
    add_adapters(model, config_in(adapter))
    load_adapters(model, adapter)
    merge_adapters(model)
    if in_4bit is not None:
        _cast(model, dtype)
    return model


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters of a model in fp32 the types that transformers loads them in. Buffers stay: positions are
    computed with fp32 tables."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if not any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.to(dtype)


def is_tied(config: PretrainedConfig) -> bool:
    """Whether the config says that the LM head is the embedding."""
    return bool(config.get_text_config().tie_word_embeddings)


def shares_embedding(model: PreTrainedModel) -> bool:
    """Whether the LM head, if there is one, is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is None or head.weight is embedding.weight


def untied_head(path: str | Path) -> str:
    """The sentence for a model that has an LM head of its own against its config."""
    return (
        f"the config.json of {path} says tie_word_embeddings, and its weights have an LM head that differs from the "
        "embedding, which would be lost: set override_config.tie_word_embeddings=False to keep it (+actor_rollout_ref."
        "model.override_config.tie_word_embeddings=False), or delete the head's tensor if it is a remnant"
    )


def check_head(path: str | Path, config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """ValueError if the config says that the LM head is the embedding, and the folder's weights have another head under
    its name. `load_model` finds heads under other names."""
    files = _weights_beside_config(base_of(path))
    if not is_tied(config) or not files:
        return
    with torch.device("meta"):
        model = empty_model(config, "policy", trust_remote_code)
    embedding = model.get_input_embeddings().weight
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding}
    found = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found += [tensors.get_tensor(name) for name in names & set(tensors.keys())]
    if any(not torch.equal(tensor, found[0]) for tensor in found[1:]):
        raise ValueError(untied_head(path))


def _weights_beside_config(path: str | Path) -> list[Path]:
    """The files of weights of a Hugging Face folder. A checkpoint's are its shards: what lies beside its config is not
    read."""
    source = find_model(path)
    return sorted(source.huggingface.glob("*.safetensors")) if source.shards is None else []


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens of the longest row that the model was made for, as far as its config says; stretched rotary positions
    count as stretched."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if not isinstance(factor, (int, float)):
        return positions
    return max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))


class NoSuchClass(ValueError):
    """transformers has no class of the kind for a type of model."""


def find_class(config: PretrainedConfig, kind: Kind, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class of the model that `config` describes.

    Raises:
        NoSuchClass: there is none for `kind`.
        ValueError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            return type(empty_model(config, kind, trust_remote_code))
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        what = {"policy": "a language model", "score": "a discriminator"}[kind]
        said = f"a model of type {config.model_type} cannot be built as {what}: "
        reason = str(error).strip().splitlines()[0][:200]
        if "Unrecognized configuration class" in reason:
            raise NoSuchClass(
                f"{said}transformers has no such class for it (models of images or sound, encoders and "
                "encoder-decoders have none); take a causal model of text"
            ) from error
        raise ValueError(said + reason) from error


def check_labels(path: str | Path) -> None:
    """ValueError for a discriminator or a reward model whose number of labels is not one, and for a reward model of a
    class whose head is not known."""
    path = base_of(path)
    entries = config_entries(path)
    refuse_other_rewards(path, entries)
    if not is_discriminator(path):
        return
    if is_reward_model(entries):
        labels = labels_of(entries, _weights_beside_config(path))
    else:
        # The head says it where there is one; a config is silent about its labels if they are two.
        labels = len(entries.get("id2label") or [None])
        for file in _weights_beside_config(path):
            with safe_open(file, framework="pt") as tensors:
                for name in {f"{head}.weight" for head in SCORE_HEADS} & set(tensors.keys()):
                    labels = tensors.get_slice(name).get_shape()[0]
    if labels != 1:
        raise ValueError(
            f"expected a score head with one label, got {labels} labels in {path}; pass a discriminator, or the "
            "language model that it was made from, for a fresh head"
        )


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a model computes with and keeps in checkpoints, by name: biases of expert routers, say."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(prefix, recurse=False):
            if buffer is not None and name.rpartition(".")[2] not in child._non_persistent_buffers_set:
                yield name, buffer


def empty_model(
    config: PretrainedConfig, kind: Kind, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model on CPU with uninitialised weights; its computed tables (rotary) are right, and in fp32."""
    with no_init_weights():
        model = AUTO_CLASSES[kind].from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    # Tying happens in the initialisation that was left out.
    model.tie_weights()
    return model
