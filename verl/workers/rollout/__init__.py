"""Generation engines by name. An engine is imported only when it is chosen."""

from importlib import import_module

from verl.workers.rollout.base import BaseRollout

ROLLOUTS = {
    "hf": "verl.workers.rollout.hf_rollout.HFRollout",
    "vllm": "verl.workers.rollout.vllm_rollout.vllm_rollout.VLLMRollout",
}


def get_rollout_class(name: str) -> type[BaseRollout]:
    """The engine called `name`; ValueError if there is none."""
    if name not in ROLLOUTS:
        raise ValueError(f"unknown rollout {name!r}: use one of {', '.join(ROLLOUTS)}")
    module, _, cls = ROLLOUTS[name].rpartition(".")
    return getattr(import_module(module), cls)


__all__ = ["ROLLOUTS", "BaseRollout", "get_rollout_class"]
