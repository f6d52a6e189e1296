"""Names of verl's that nothing here calls."""

from verl.config.run import Config
from verl.trainer.ppo.roles import Role

__all__ = ["Role", "need_critic", "need_reference_policy"]


def need_critic(config: Config) -> bool:
    """Whether there is a discriminator."""
    return config.use_critic


def need_reference_policy(config: Config) -> bool:
    """Whether a KL term needs the frozen reference."""
    return config.use_reference
