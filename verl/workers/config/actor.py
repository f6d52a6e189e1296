"""Names of verl's that nothing here calls: these settings are in `verl.config.actor`."""

from verl.config.actor import ActorConfig, ActorRolloutRefConfig, PolicyLossConfig, RefConfig

__all__ = ["ActorConfig", "ActorRolloutRefConfig", "PolicyLossConfig", "RefConfig"]
