"""Token-classification classes for families that have none: the family's backbone and a linear `score`.

transformers has such classes for some of its families, and code that comes with a model nearly never has one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GenericForTokenClassification

# Entries of a config's auto_map, by which a folder's own code is found.
POLICY, BACKBONE, DISCRIMINATOR = "AutoModelForCausalLM", "AutoModel", "AutoModelForTokenClassification"
# What a class says of itself and transformers asks it.
SAID_OF_THE_CLASS = (
    "_no_split_modules", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend",
)  # fmt: skip


def register_score_class(config_class: type[PretrainedConfig]) -> None:
    """A token-classification class for a family to which transformers gives none: its backbone and a linear `score`,
    as its other such classes have. From then on the auto classes of this process know it."""
    if config_class in AutoModelForTokenClassification._model_mapping or config_class not in AutoModel._model_mapping:
        return
    backbone = AutoModel._model_mapping[config_class]
    if isinstance(backbone, tuple):
        return
    parent = next(iter(_parents(backbone)), None)
    if parent is not None:
        _register(config_class, backbone, parent, parent.base_model_prefix)


def register_own_score_class(config: PretrainedConfig) -> None:
    """The same for a model whose code is in its folder, which is run, and has no such class.

    Raises:
        ValueError: the code is for a config class of transformers' own, whose class for discriminators would compute
            something else than the folder's code; or its language model has no backbone.
    """
    own = getattr(config, "auto_map", None) or {}
    if DISCRIMINATOR in own or not {POLICY, BACKBONE} & own.keys():
        return
    config_class = type(config)
    if config_class.__module__.startswith("transformers."):
        raise ValueError(
            f"{config.name_or_path} has code of its own for a {config_class.__name__}, and no class for "
            f"{DISCRIMINATOR} in it, so that transformers' would be taken, which computes something else: add one to "
            "the folder's code and its auto_map, or use another model as discriminator"
        )
    if config_class in AutoModelForTokenClassification._model_mapping:
        return
    backbone, prefix = _own_backbone(config, own)
    AutoModel.register(config_class, backbone, exist_ok=True)
    # Not a whole model: its parts would be built beside those of the backbone.
    plain = (base for base in _parents(backbone) if base.__init__ is PreTrainedModel.__init__)
    _register(config_class, backbone, next(plain, PreTrainedModel), prefix)


def _own_backbone(config: PretrainedConfig, own: dict[str, Any]) -> tuple[type[PreTrainedModel], str]:
    """The backbone's class, and the name under which the folder's weights have it."""
    if POLICY not in own:
        backbone = get_class_from_dynamic_module(own[BACKBONE], config.name_or_path)
        return backbone, backbone.base_model_prefix
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    backbone = model.base_model
    if backbone is model or not isinstance(backbone, PreTrainedModel):
        raise ValueError(
            f"{config.name_or_path}: the {type(model).__name__} in its code has no backbone that is a PreTrainedModel "
            f"under base_model_prefix={model.base_model_prefix!r}, on which a score head could be put: add a class for "
            f"{DISCRIMINATOR} to its code and auto_map, or use another model as discriminator"
        )
    return type(backbone), model.base_model_prefix


def _parents(model_class: type[PreTrainedModel]) -> list[type[PreTrainedModel]]:
    """The classes that a model's class is made from, the nearest first, without PreTrainedModel."""
    bases = model_class.__mro__[1:]
    return [base for base in bases if issubclass(base, PreTrainedModel) and base is not PreTrainedModel]


def _register(
    config_class: type[PretrainedConfig],
    backbone: type[PreTrainedModel],
    parent: type[PreTrainedModel],
    prefix: str,
) -> None:
    score_class = type(
        f"{backbone.__name__.removesuffix('Model')}ForTokenClassification",
        (GenericForTokenClassification, parent),
        {
            "__module__": backbone.__module__,
            "base_model_prefix": prefix,
            "config_class": config_class,
            **{name: getattr(backbone, name) for name in SAID_OF_THE_CLASS if hasattr(backbone, name)},
        },
    )
    # `register` passes over configs of transformers' own, in some versions (5.17) whatever exist_ok says.
    AutoModelForTokenClassification._model_mapping._extra_content[config_class] = score_class
