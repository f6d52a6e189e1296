"""Typed, frozen settings: one dataclass per config group, and `run.Config` with all of them. Defaults live in
`verl/trainer/config/*.yaml` alone."""

from verl.config.actor import ActorConfig, ActorRolloutRefConfig, PolicyLossConfig, RefConfig
from verl.config.critic import (
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
from verl.config.engine import FSDPConfig, ModelConfig, OptimizerConfig, WrapPolicy
from verl.config.rollout import RolloutConfig, SamplingConfig
from verl.config.soda import SodaConfig

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
    "WrapPolicy",
]
