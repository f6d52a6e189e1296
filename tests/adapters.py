"""Adapters with values as after training, which tests put into tiny models, and PEFT's own models beside them."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from verl.models.adapters import add_adapters

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some": {"target_modules": ["q_proj", "down_proj"]},
}
# What PEFT is told of adapters beside weights in 4 bits.
BESIDE_4BIT = {"4bit": {}}


def adapter_config(kind: str = "lora", rank: int = 4, **entries) -> LoraConfig:
    """A config of PEFT's; rank 4 and alpha 12, so that the scale of LoRA is 3 and that of rsLoRA 6."""
    return LoraConfig(
        **{"r": rank, "lora_alpha": 12, "target_modules": "all-linear", **(KINDS | BESIDE_4BIT)[kind], **entries}
    )


def train_a_little(module: nn.Module) -> None:
    """Give every adapter values that are a function of its name after `layers.`, none of them zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                key = name[name.index("layers.") :]
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
                parameter.add_(0.2 * noise)


def adapted(hf: PreTrainedModel, kind: str = "lora", **entries) -> PreTrainedModel:
    """The model with adapters that change what it computes."""
    add_adapters(hf, adapter_config(kind, **entries))
    train_a_little(hf)
    return hf


def with_peft(hf: PreTrainedModel, kind: str = "lora", **entries) -> PeftModel:
    """The same by PEFT's own way of making it, around a plain model."""
    model = get_peft_model(hf, adapter_config(kind, task_type="CAUSAL_LM", **entries))
    train_a_little(model)
    return model


def write_peft_folder(folder: Path, base: Path, hf: PreTrainedModel, kind: str = "lora", **entries) -> PeftModel:
    """An adapter's folder as PEFT writes it, beside `base`, the folder of the model `hf`."""
    model = with_peft(hf, kind, **entries)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return model
