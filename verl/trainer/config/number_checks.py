"""Numbers that no tensor and no random generator takes: too large, or none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from verl.config.run import Config

# Of fp32.
LARGEST = (2 - 2**-23) * 2.0**127
LARGEST_INT = 2**63 - 1
# Limits, which infinity switches off.
MAY_BE_INFINITE = frozenset({"grad_clip", "sync_check_tolerance"})


def number_conflicts(config: Config) -> Iterator[str]:
    """Numbers of the settings that fp32 or a 64-bit integer does not hold, and rates that AdamW makes such of."""
    for key, value in _numbers(config, ""):
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            yield f"{key}={_shortened(value)}: expected an integer of 64 bits"
        elif isinstance(value, float) and not _is_held(key, value):
            yield f"{key}={value}: expected a number that fp32 holds, at most {LARGEST:.2g}"
    parts = [("actor_rollout_ref.actor", config.actor_rollout_ref.actor.optim)]
    if config.use_critic:
        parts.append(("critic", config.critic.optim))
    for name, optim in parts:
        # AdamW's first step is lr / (1 - beta1), and weights decay by lr * weight_decay.
        factor = max(1 / (1 - optim.betas[0]), optim.weight_decay)
        if optim.lr * factor > LARGEST >= optim.lr:
            yield (
                f"{name}.optim.lr={optim.lr} with betas={list(optim.betas)} and weight_decay={optim.weight_decay} "
                f"makes steps that fp32 does not hold: lower it, below {LARGEST / factor:.2g} at least"
            )


def _is_held(key: str, value: float) -> bool:
    if math.isinf(value) and value > 0 and key.rsplit(".", 1)[-1] in MAY_BE_INFINITE:
        return True
    return math.isfinite(value) and abs(value) <= LARGEST


def _shortened(value: int) -> str:
    digits = str(value)
    return digits if len(digits) <= 30 else f"{digits[:10]}...({len(digits)} digits)"


def _numbers(settings: Any, prefix: str) -> Iterator[tuple[str, int | float]]:
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{key}.")
        elif isinstance(value, int | float):
            yield key, value
