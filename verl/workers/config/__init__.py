"""Typed, frozen settings, one dataclass per config group. Defaults live in `verl/trainer/config/*.yaml` alone."""

from verl.workers.config.actor import ActorConfig, ActorRolloutRefConfig, PolicyLossConfig, RefConfig
from verl.workers.config.critic import (
    AdaptiveTemperatureConfig,
    BalanceConfig,
    BradleyTerryConfig,
    CriticConfig,
    DiscriminatorConfig,
    HeadStartConfig,
    HingeConfig,
    RankingConfig,
    ReplayConfig,
    TwoSidedHingeConfig,
)
from verl.workers.config.engine import FSDPConfig, ModelConfig, OptimizerConfig
from verl.workers.config.rollout import RolloutConfig, SamplingConfig
from verl.workers.config.soda import SodaConfig

__all__ = [
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AdaptiveTemperatureConfig",
    "BalanceConfig",
    "BradleyTerryConfig",
    "CriticConfig",
    "DiscriminatorConfig",
    "FSDPConfig",
    "HeadStartConfig",
    "HingeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyLossConfig",
    "RankingConfig",
    "RefConfig",
    "ReplayConfig",
    "RolloutConfig",
    "SamplingConfig",
    "SodaConfig",
    "TwoSidedHingeConfig",
]
