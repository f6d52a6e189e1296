"""Names of verl's that nothing here calls: these settings are in `verl.config.critic`."""

from verl.config.critic import (
    AdaptiveTemperatureConfig,
    BalanceConfig,
    BradleyTerryConfig,
    CriticConfig,
    CriticModelConfig,
    DiscriminatorConfig,
    HeadStartConfig,
    HingeConfig,
    RankingConfig,
    ReplayConfig,
    TwoSidedHingeConfig,
)

__all__ = [
    "AdaptiveTemperatureConfig",
    "BalanceConfig",
    "BradleyTerryConfig",
    "CriticConfig",
    "CriticModelConfig",
    "DiscriminatorConfig",
    "HeadStartConfig",
    "HingeConfig",
    "RankingConfig",
    "ReplayConfig",
    "TwoSidedHingeConfig",
]
