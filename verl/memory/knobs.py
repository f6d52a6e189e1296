"""One list of the settings that reduce GPU memory in each phase, used by the estimate and by out-of-memory errors.

The errors come in phases that the estimate leaves out, on workers that know their own settings alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from verl.config import ActorConfig, ActorRolloutRefConfig, CriticConfig, FSDPConfig, ModelConfig, RolloutConfig

Phase = Literal[
    "init",
    "push_weights",
    "generate",
    "compute_log_prob",
    "compute_ref_log_prob",
    "update_actor",
    "compute_scores",
    "update_critic",
]
POLICY = "actor_rollout_ref"
ACTOR_FSDP, REF_FSDP = f"{POLICY}.actor.fsdp_config", f"{POLICY}.ref.fsdp_config"
CRITIC_FSDP = "critic.model.fsdp_config"


@dataclass(frozen=True)
class Knob:
    """A setting by its whole key, its present value, and a better one, which mostly is one that needs less memory."""

    key: str
    now: Any
    better: Any

    def __str__(self) -> str:
        return f"{self.key}={self.better} (now {self.now})"


def knobs(phase: Phase, policy_settings: ActorRolloutRefConfig | None, critic: CriticConfig | None) -> list[Knob]:
    """The settings to change in a phase: the work's own first, then those of what rests beside it.

    Args:
        policy_settings, critic: None where there are none or the caller does not know them, which leaves them out.
    """
    found: list[Knob] = []
    if policy_settings is not None:
        found += _own_of_policy(phase, policy_settings)
    if critic is not None and phase in ("compute_scores", "update_critic"):
        found += _own_of_critic(phase, critic, None if policy_settings is None else policy_settings.rollout)
    if policy_settings is not None:
        found += _resting_of_policy(phase, policy_settings)
    if critic is not None:
        found += _offload(CRITIC_FSDP, critic.model.fsdp_config, *_resting_flags(phase, _AT_WORK_CRITIC))
    return found


_ENGINE_PHASES = ("init", "push_weights", "generate")
# The offload flags of the model at work that still help: what the work needs cannot rest.
_AT_WORK_ACTOR = {"push_weights": ("optimizer",), "compute_log_prob": ("optimizer",), "update_actor": ()}
_AT_WORK_REF = {"compute_ref_log_prob": ()}
_AT_WORK_CRITIC = {"compute_scores": ("optimizer",), "update_critic": ()}


def _resting_flags(phase: Phase, at_work: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return at_work.get(phase, ("param", "optimizer"))


def _own_of_policy(phase: Phase, policy_settings: ActorRolloutRefConfig) -> Iterator[Knob]:
    actor, rollout = policy_settings.actor, policy_settings.rollout
    if phase == "update_actor":
        longest = rollout.prompt_length + rollout.response_length
        yield from _micro_batch(f"{POLICY}.actor", actor, ceil(longest / actor.ulysses_sequence_parallel_size))
        yield from _recomputation(f"{POLICY}.model", policy_settings.model)
        yield from _gradients(ACTOR_FSDP, actor.fsdp_config)
        yield from _resharding(ACTOR_FSDP, actor.fsdp_config)
    elif phase in ("compute_log_prob", "compute_ref_log_prob"):
        yield from _log_prob_micro_batch(policy_settings)
        is_actor = phase == "compute_log_prob"
        fsdp = actor.fsdp_config if is_actor else policy_settings.ref.fsdp_config
        yield from _resharding(ACTOR_FSDP if is_actor else REF_FSDP, fsdp)
    elif phase in _ENGINE_PHASES:
        if rollout.name == "vllm":
            lower = round(rollout.gpu_memory_utilization - 0.1, 2)
            if lower > 0:
                yield Knob(f"{POLICY}.rollout.gpu_memory_utilization", rollout.gpu_memory_utilization, lower)
        elif phase == "generate" and rollout.max_num_seqs > 1:
            yield Knob(f"{POLICY}.rollout.max_num_seqs", rollout.max_num_seqs, rollout.max_num_seqs // 2)


def _own_of_critic(phase: Phase, critic: CriticConfig, rollout: RolloutConfig | None) -> Iterator[Knob]:
    longest = 1 if rollout is None else rollout.prompt_length + rollout.response_length
    yield from _micro_batch("critic", critic, ceil(longest / critic.ulysses_sequence_parallel_size))
    if phase == "update_critic":
        yield from _recomputation("critic.model", critic.model)
        yield from _gradients(CRITIC_FSDP, critic.model.fsdp_config)
    yield from _resharding(CRITIC_FSDP, critic.model.fsdp_config)


def _resting_of_policy(phase: Phase, policy_settings: ActorRolloutRefConfig) -> Iterator[Knob]:
    yield from _offload(ACTOR_FSDP, policy_settings.actor.fsdp_config, *_resting_flags(phase, _AT_WORK_ACTOR))
    if not policy_settings.actor.use_sft_mode and "param" in _resting_flags(phase, _AT_WORK_REF):
        yield from _offload(REF_FSDP, policy_settings.ref.fsdp_config, "param")
    if (
        policy_settings.rollout.name == "vllm"
        and not policy_settings.rollout.free_cache_engine
        and phase not in _ENGINE_PHASES
    ):
        yield Knob(f"{POLICY}.rollout.free_cache_engine", False, True)


def _micro_batch(key: str, part: ActorConfig | CriticConfig, longest: int) -> Iterator[Knob]:
    if part.use_dynamic_bsz:
        lower = max(longest, part.ppo_max_token_len_per_gpu // 2)
        if lower < part.ppo_max_token_len_per_gpu:
            yield Knob(f"{key}.ppo_max_token_len_per_gpu", part.ppo_max_token_len_per_gpu, lower)
    elif part.ppo_micro_batch_size_per_gpu > 1:
        size = part.ppo_micro_batch_size_per_gpu
        yield Knob(f"{key}.ppo_micro_batch_size_per_gpu", size, size // 2)


def _log_prob_micro_batch(policy_settings: ActorRolloutRefConfig) -> Iterator[Knob]:
    rollout, key = policy_settings.rollout, f"{POLICY}.rollout.log_prob"
    if rollout.log_prob_use_dynamic_bsz:
        now = rollout.log_prob_max_token_len_per_gpu
        longest = rollout.prompt_length + rollout.response_length
        lower = max(ceil(longest / policy_settings.actor.ulysses_sequence_parallel_size), now // 2)
        if lower < now:
            yield Knob(f"{key}_max_token_len_per_gpu", now, lower)
    elif rollout.log_prob_micro_batch_size_per_gpu > 1:
        size = rollout.log_prob_micro_batch_size_per_gpu
        yield Knob(f"{key}_micro_batch_size_per_gpu", size, size // 2)


def _recomputation(key: str, model: ModelConfig) -> Iterator[Knob]:
    if not model.enable_gradient_checkpointing:
        yield Knob(f"{key}.enable_gradient_checkpointing", False, True)
    elif model.recompute_share < 1:
        yield Knob(f"{key}.recompute_share", model.recompute_share, 1.0)


def _gradients(key: str, fsdp: FSDPConfig) -> Iterator[Knob]:
    if fsdp.sync_gradients_once:
        yield Knob(f"{key}.sync_gradients_once", True, False)


def _resharding(key: str, fsdp: FSDPConfig) -> Iterator[Knob]:
    if not fsdp.reshard_after_forward:
        yield Knob(f"{key}.reshard_after_forward", False, True)


def _offload(key: str, fsdp: FSDPConfig, *parts: str) -> Iterator[Knob]:
    for part in parts:
        if not getattr(fsdp, f"{part}_offload"):
            yield Knob(f"{key}.{part}_offload", False, True)
