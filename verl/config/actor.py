"""Settings of the policy and its frozen reference, and the policy settings, which hold them with the rollout."""

from typing import Literal

from verl.config.base import Fraction, NonNegative, Positive, PositiveFloat, settings
from verl.config.engine import FSDPConfig, ModelConfig, OptimizerConfig
from verl.config.rollout import RolloutConfig


@settings
class PolicyLossConfig:
    """The registered policy loss that trains the actor."""

    loss_mode: str


@settings
class ActorConfig:
    """The policy's update. Batch sizes count prompts for mini-batches and sequences for micro-batches."""

    strategy: Literal["fsdp", "fsdp2"]
    use_sft_mode: bool
    ppo_mini_batch_size: Positive
    ppo_micro_batch_size_per_gpu: Positive | None
    use_dynamic_bsz: bool
    ppo_max_token_len_per_gpu: Positive
    ppo_epochs: Positive
    ulysses_sequence_parallel_size: Positive
    grad_clip: PositiveFloat
    policy_loss: PolicyLossConfig
    clip_ratio: NonNegative
    clip_ratio_low: Fraction | None
    clip_ratio_high: NonNegative | None
    clip_ratio_c: float
    loss_agg_mode: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
    entropy_coeff: float
    use_kl_loss: bool
    kl_loss_coef: NonNegative
    kl_loss_type: str
    sft_anchor_coef: NonNegative
    sft_anchor_end_coef: NonNegative | None
    optim: OptimizerConfig
    fsdp_config: FSDPConfig


@settings
class RefConfig:
    """The frozen reference model, a copy of the actor's initial weights."""

    ulysses_sequence_parallel_size: Positive
    fsdp_config: FSDPConfig


@settings
class ActorRolloutRefConfig:
    """The policy settings: everything around the policy, one process per rank."""

    model: ModelConfig
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig
