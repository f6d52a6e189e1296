"""Names of verl's that nothing here calls: these settings are in `verl.config.engine`."""

from verl.config.engine import FSDPConfig, ModelConfig, OptimizerConfig

__all__ = ["FSDPConfig", "ModelConfig", "OptimizerConfig"]
