"""Names of verl's that nothing here calls: the settings are in `verl.config`."""

from verl.config import ActorConfig, CriticConfig, FSDPConfig, OptimizerConfig, RolloutConfig

__all__ = ["ActorConfig", "CriticConfig", "FSDPConfig", "OptimizerConfig", "RolloutConfig"]
