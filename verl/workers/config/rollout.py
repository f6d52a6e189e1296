"""Names of verl's that nothing here calls: these settings are in `verl.config.rollout`."""

from verl.config.rollout import RolloutConfig, SamplingConfig

__all__ = ["RolloutConfig", "SamplingConfig"]
