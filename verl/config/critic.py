"""Settings of the critic, which in this trainer is the discriminator."""

from typing import Any, Literal

from verl.config.base import BelowOne, Count, Fraction, NonNegative, Positive, PositiveFloat, settings
from verl.config.engine import FSDPConfig, ModelConfig, OptimizerConfig


@settings
class BradleyTerryConfig:
    """The Bradley-Terry loss has no constants."""


@settings
class HingeConfig:
    """Constants of the hinge loss, and of the part that the two-sided one shares with it."""

    margin: float
    ranking_coef: NonNegative
    temperature: PositiveFloat
    clamp: PositiveFloat


@settings
class TwoSidedHingeConfig(HingeConfig):
    """Constants of the two-sided hinge loss."""

    upper: float


@settings
class RankingConfig:
    """Constants of the ranking loss (`core_algos.ranking_loss`)."""

    ranking_coef: NonNegative
    temperature: PositiveFloat
    clamp: PositiveFloat
    reg_coef: NonNegative
    reg_on: Literal["raw", "pooled", "centre"]
    diff_limit: float
    diff_coef: NonNegative


@settings
class AdaptiveTemperatureConfig:
    """The temperature that follows the mean difference (`core_algos.adapted_temperature`)."""

    enable: bool
    offset: NonNegative
    slope: NonNegative
    lowest: PositiveFloat
    highest: PositiveFloat


@settings
class DiscriminatorConfig:
    """The loss and the scores it works on. `pooling=None` is the pooling that the loss was made for."""

    loss: str
    pooling: Literal["last_token", "mean", "sum"] | None
    exclude_eos: bool
    adaptive_temperature: AdaptiveTemperatureConfig
    bradley_terry: BradleyTerryConfig
    hinge: HingeConfig
    two_sided_hinge: TwoSidedHingeConfig
    ranking: RankingConfig
    custom: dict[str, Any]

    def constants(self) -> dict[str, Any]:
        """The chosen loss's own constants; a loss from a user's file gets those under `custom`."""
        return dict(vars(getattr(self, self.loss))) if hasattr(self, self.loss) else dict(self.custom)


@settings
class ReplayConfig:
    """Past student answers that the discriminator keeps meeting."""

    capacity: Count
    fraction: BelowOne


@settings
class BalanceConfig:
    """The band of accuracy in which the discriminator is kept (`DiscriminatorBalance`)."""

    enable: bool
    lowest: Fraction
    highest: Fraction
    smoothing: BelowOne


@settings
class HeadStartConfig:
    """The end of a head start with `trainer.critic_warmup=auto` (`HeadStart`)."""

    accuracy: Fraction
    checks: Positive
    check_every: Positive
    max_steps: Positive


@settings
class CriticModelConfig(ModelConfig):
    """The critic keeps its sharding under its model, as verl does, and may have no base of its own."""

    share_base: bool | None
    fsdp_config: FSDPConfig


@settings
class CriticConfig:
    """The discriminator's update. Mini-batches count prompts; micro-batches hold whole groups."""

    enable: bool | None
    strategy: Literal["fsdp", "fsdp2"]
    model: CriticModelConfig
    optim: OptimizerConfig
    ppo_mini_batch_size: Positive
    ppo_micro_batch_size_per_gpu: Positive | None
    use_dynamic_bsz: bool
    ppo_max_token_len_per_gpu: Positive
    ppo_epochs: Positive
    ulysses_sequence_parallel_size: Positive
    grad_clip: PositiveFloat
    max_prompt_length: Positive | None
    max_response_length: Positive | None
    discriminator: DiscriminatorConfig
    replay: ReplayConfig
    balance: BalanceConfig
    head_start: HeadStartConfig
    held_out_prompts: Count


def past_groups(mini_batch_size: int, fraction: float, ranks: int) -> int:
    """Past groups beside `mini_batch_size` fresh ones so that they are `fraction` of all, as near as whole groups
    on every rank allow."""
    return round(mini_batch_size * fraction / (1 - fraction) / ranks) * ranks
