"""Tensors under the names, and in the layout, that models of a class are published with.

transformers keeps experts in one tensor, say, and calls some parts otherwise in memory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

# A name up to the number of its layer; whole, if there is none.
LAYER = re.compile(r".*?\.\d+\.|.*")
Weights = Iterator[tuple[str, torch.Tensor]]


def is_converted(model: PreTrainedModel) -> bool:
    """Whether there is anything to convert in the model's class."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def checkpoint_tensors(model: PreTrainedModel, weights: Weights) -> Weights:
    """The tensors as a checkpoint of the class has them, which is how vLLM knows them.

    Args:
        weights: under the names that they have in `model`; those of a layer follow each other. A layer's are held
            together where there is anything to convert.
    """
    if not is_converted(model):
        yield from weights
        return
    for _, group in itertools.groupby(weights, key=lambda item: LAYER.match(item[0]).group()):
        yield from revert_weight_conversion(model, dict(group)).items()
