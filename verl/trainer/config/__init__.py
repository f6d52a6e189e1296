"""Settings of a run: YAML groups with the defaults, typed classes, loading and checks."""

from verl.config.run import AlgorithmConfig, Config, DataConfig, KLControlConfig, TrainerConfig
from verl.trainer.config.errors import ConfigError
from verl.trainer.config.loading import compose_config, to_config
from verl.trainer.config.overrides import normalize_overrides

__all__ = [
    "AlgorithmConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "KLControlConfig",
    "TrainerConfig",
    "compose_config",
    "normalize_overrides",
    "to_config",
]
