"""Proof that a class computes with adapters what it computes with the weights that they are merged into.

The student is trained with its adapters beside the weights, and answers with merged ones. A class that reads the weight
of a layer itself, instead of calling the layer, would leave the adapter out silently. So, before a run, a small twin
(`twin.py`) with adapters that do change something is compared with itself after merging.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from verl.models.adapters import adapted_layers, add_adapters, merge_adapters
from verl.models.proof import proof_rows
from verl.models.twin import own_config, small_twin

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

# Largest difference, in spreads of the logits. Rounding is near 1e-6; an adapter that is left out makes 1e-1 and more.
TOLERANCE = 1e-4


def check_merging(model_class: type[PreTrainedModel], config: PretrainedConfig, adapters: LoraConfig) -> None:
    """Compare a twin of the class with its merged self. A config without a small twin that works gets no verdict: the
    gap between trainer and engine, which every step measures, decides over it. Of a model of pictures and text whose
    class is that of its text alone, its own part of the config counts.

    Raises:
        ValueError: they differ; names the layers.
    """
    try:
        twin = small_twin(model_class, own_config(model_class, config))
        gap = _gap(twin, adapters)
    except Exception as error:
        # Sizes that do not fit together fail in any way, and so do adapters of layers that the twin has not.
        logger.info(
            "%s has no small twin with these adapters (%s): merging them is not proved", model_class.__name__, error
        )
        return
    if gap <= TOLERANCE:
        return
    layers = _trained_copy(twin, adapters)
    names = sorted({name.rpartition(".")[2] for name in adapted_layers(layers)})
    faulty = [name for name in names if not _gap(twin, adapters, only=name) <= TOLERANCE]
    raise ValueError(
        f"{model_class.__name__} does not compute with the adapters of {', '.join(faulty or names)} what it computes "
        f"with merged weights (by {gap:.2g} of the logits' spread), so answers would be another model's: leave them "
        "out (exclude_modules)"
    )


def _trained_copy(twin: PreTrainedModel, adapters: LoraConfig) -> PreTrainedModel:
    """The twin with adapters that are as if they had been trained: none of their matrices is zero."""
    model = copy.deepcopy(twin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        add_adapters(model, adapters)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                for name, parameter in layer.named_parameters():
                    if name.startswith("lora_"):
                        parameter.add_(0.3 * parameter.abs().mean().clamp(min=0.1) * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def _gap(twin: PreTrainedModel, adapters: LoraConfig, only: str | None = None) -> float:
    """The largest difference of the logits, in spreads of them; `only`: of the adapters, those of layers so named."""
    model = _trained_copy(twin, adapters)
    for name, layer in adapted_layers(model).items():
        if only not in (None, name.rpartition(".")[2]):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.base_layer)
    prompt, answer = next(iter(proof_rows(model.config).unpadded()))
    ids = torch.cat([prompt, answer]).unsqueeze(0)
    beside = model(input_ids=ids).logits
    merge_adapters(model)
    return ((model(input_ids=ids).logits - beside).abs().max() / beside.std().clamp(min=1e-6)).item()
