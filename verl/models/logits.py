"""How a family makes logits of its head's output: as they are, scaled, capped.

A family says so in its config. An entry counts only where the class's own forward names it, since configs carry entries
that nothing reads; that the result is right is proved with all else (`proof.py`).
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

# Entries of configs. The head's output is multiplied by a scale or divided by it: one name is either, by the family.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitForm:
    """Logits of the head's output x: cap tanh(scale x / cap), or scale x where the cap is 0."""

    scale: float = 1.0
    cap: float = 0.0

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The logits."""
        scaled = output if self.scale == 1 else output * self.scale
        return self.cap * (scaled / self.cap).tanh() if self.cap else scaled

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logits / d x: scale (1 - (logits / cap)^2)."""
        return self.scale * (1 - (logits / self.cap).square()) if self.cap else self.scale


PLAIN_LOGITS = LogitForm()


def logit_form(model_class: type[PreTrainedModel], config: PretrainedConfig) -> LogitForm:
    """The form of a class's logits, as its config has it."""
    text = config.get_text_config()
    named = {name: getattr(text, name, None) for name in (*SCALES, *CAPS)}
    numbers = {name: value for name, value in named.items() if isinstance(value, (int, float)) and value}
    if not numbers:
        return PLAIN_LOGITS
    source = inspect.getsource(model_class.forward)
    read = {name: float(value) for name, value in numbers.items() if name in source}
    scale = 1.0
    for name in read.keys() & set(SCALES):
        divides = re.search(rf"/=?\s*[\w.]*\b{name}\b", source)
        scale *= 1 / read[name] if divides else read[name]
    return LogitForm(scale, next((read[name] for name in CAPS if name in read), 0.0))
