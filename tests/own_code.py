"""A tiny model whose code is in its folder, as on the hub: Qwen2's layers, and hidden states that are scaled by an
entry of a config of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.tiny import SIZES, byte_tokenizer

CONFIGURATION = """
from transformers import Qwen2Config


class MineConfig(Qwen2Config):
    model_type = "mine"

    def __init__(self, output_scale=1.0, **kwargs):
        self.output_scale = output_scale
        super().__init__(**kwargs)
"""
SCALES = """
def scaled(output, config):
    output.last_hidden_state = output.last_hidden_state * config.output_scale
    return output
"""
MODELING = """
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from .configuration_mine import MineConfig
from .scales import scaled


class MineModel(Qwen2Model):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs), self.config)


class MineForCausalLM(Qwen2ForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MineModel(config)
        self.post_init()
"""
AUTO_MAP = {
    "AutoConfig": "configuration_mine.MineConfig",
    "AutoModel": "modeling_mine.MineModel",
    "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
}
FILES = {"configuration_mine.py": CONFIGURATION, "scales.py": SCALES, "modeling_mine.py": MODELING}


def write_own_code(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    auto_map: dict[str, str] = AUTO_MAP,
    seed: int = 0,
) -> Path:
    """A folder with code, config, random weights and a tokenizer, the byte tokenizer where none is given."""
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    entries = {"model_type": "mine", "output_scale": 3.0, "pad_token_id": 0, "eos_token_id": 1, **SIZES}
    file = folder / "config.json"
    file.write_text(json.dumps({**entries, "architectures": ["MineForCausalLM"], "auto_map": AUTO_MAP}))
    torch.manual_seed(seed)
    model = plain(folder, trained=False)
    model.save_pretrained(folder)
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"auto_map": auto_map}))
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def plain(folder: Path, trained: bool = True) -> PreTrainedModel:
    """The folder's model as transformers makes it."""
    from transformers import AutoConfig

    if trained:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)
