"""Roles of worker processes, and which of them a configuration needs."""

from enum import Enum

from verl.trainer.config.schema import Config


class Role(Enum):
    """What a group of workers does; the policy's processes also generate and hold the frozen reference."""

    ActorRollout = "actor_rollout"
    Critic = "critic"

    def __str__(self) -> str:
        return self.value


def need_critic(config: Config) -> bool:
    """Whether there is a discriminator."""
    return config.use_critic


def need_reference_policy(config: Config) -> bool:
    """Whether a KL term needs the frozen reference."""
    return config.use_reference
