"""Updates of adapted models on the batch of `updates_setup`; imported by child processes too."""

from __future__ import annotations

import torch

from tests.adapters import adapter_config, train_a_little
from tests.workers.updates_setup import update
from verl.models.adapters import add_adapters
from verl.models.answer_models import AnswerModel
from verl.models.four_bit import put_in_4bit
from verl.protocol import DataProto
from verl.trainer.config import Config


def adapt(module: AnswerModel, kind: str = "lora") -> AnswerModel:
    """Put adapters, as after training, into a wrapped model; `4bit`: into one whose weights are in 4 bits."""
    add_adapters(module.hf, adapter_config(kind))
    if kind == "4bit":
        put_in_4bit(module.hf, torch.float32)
    train_a_little(module)
    return module


def adapted_update(loss: str, config: Config, data: DataProto, kind: str = "lora", wrap=lambda module: module):
    """`update` of an adapted model: its gradients by name, whole, and the metrics."""
    module, metrics = update(loss, config, data, lambda plain: wrap(adapt(plain, kind)))
    return gradients_of(module), metrics


def gradients_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of all parameters that have one."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        for name, gradient in found.items()
    }
