"""Settings with which a run fits into its GPUs, by the trainer's own estimate of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.config.run import Config
from verl.memory.check import run_settings
from verl.memory.estimate import PHASES, MemoryEstimate, estimate_memory
from verl.memory.knobs import Phase, knobs
from verl.memory.small import larger_micro_batches
from verl.models.loading import load_config
from verl.models.shape import ModelShape
from verl.utils.units import GIB

# What a change has to save to be worth a setting.
WORTH = 0.05 * GIB
MOST_CHANGES = 60


@dataclass(frozen=True)
class Machine:
    """Sizes of the models and of one GPU. The discriminator is taken to be as large as the student."""

    actor: ModelShape
    critic: ModelShape
    gpu_bytes: float

    @classmethod
    def of(cls, model: str, gpu_memory: float, trust_remote_code: bool = False) -> Machine:
        """Of a model's folder, and GiB of one GPU."""
        shapes = [
            ModelShape.of(load_config(model, kind, trust_remote_code=trust_remote_code), kind, trust_remote_code)
            for kind in ("policy", "score")
        ]
        return cls(*shapes, gpu_bytes=gpu_memory * GIB)


@dataclass
class Room:
    """Settings to change, each with a reason, and the phase that then needs the most, in bytes of a GPU."""

    changes: dict[str, Any] = field(default_factory=dict)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    phase: Phase = "update_actor"
    need: float = 0.0

    def sentence(self, gpu_bytes: float) -> str:
        """What it needs of what there is."""
        need, there = f"{self.need / GIB:.1f} GiB", f"{gpu_bytes / GIB:.1f} GiB"
        said = f"about {need} of {there} on each GPU while {PHASES[self.phase]}, by the trainer's estimate"
        if self.need > gpu_bytes:
            return f"does not fit: {said}; take more or larger GPUs (--gpus, --gpu_memory), or a smaller model"
        return f"{said}; the batch does not matter for that, since it is worked off in micro-batches"


def find_room(compose: Callable[[Mapping[str, Any]], Config], machine: Machine) -> Room:
    """Turn settings, the cheapest first, until every phase fits or no setting helps. Where all fits as it is, small
    models get larger micro-batches of what is left.

    Args:
        compose: the run's settings with some changed, by key.
    """
    room = Room()
    while len(room.changes) < MOST_CHANGES:
        config = compose(room.changes)
        estimate = _estimate(config, machine)
        room.phase, room.need = estimate.largest, estimate.need(estimate.largest)
        if room.need <= machine.gpu_bytes:
            if not room.changes:
                _use_what_is_left(room, config, machine)
            return room
        if not _turn_one(room, config, compose, machine):
            return room
    return room


def _use_what_is_left(room: Room, config: Config, machine: Machine) -> None:
    """Give small models larger micro-batches where these fit too."""
    critic = machine.critic if config.use_critic else None
    larger, run = larger_micro_batches(run_settings(config), machine.actor, critic, machine.gpu_bytes)
    for knob in larger:
        room.changes[knob.key] = knob.better
        why = "a small model's GPU waits for the host between micro-batches, and larger ones fit"
        room.reasons.append((knob.key, why))
    estimate = estimate_memory(run, machine.actor, critic, machine.gpu_bytes)
    room.phase, room.need = estimate.largest, estimate.need(estimate.largest)


def _estimate(config: Config, machine: Machine) -> MemoryEstimate:
    critic = machine.critic if config.use_critic else None
    return estimate_memory(run_settings(config), machine.actor, critic, machine.gpu_bytes)


def _turn_one(room: Room, config: Config, compose: Callable[[Mapping[str, Any]], Config], machine: Machine) -> bool:
    """Change the first setting that saves something in the phase that needs the most."""
    for knob in knobs(room.phase, config.actor_rollout_ref, config.critic if config.use_critic else None):
        changed = room.changes | {knob.key: knob.better}
        saved = room.need - _estimate(compose(changed), machine).need(room.phase)
        if saved > WORTH:
            room.changes[knob.key] = knob.better
            room.reasons = [reason for reason in room.reasons if reason[0] != knob.key]
            room.reasons.append((knob.key, f"saves memory while {PHASES[room.phase]}: {saved / GIB:.1f} GiB"))
            return True
    return False
