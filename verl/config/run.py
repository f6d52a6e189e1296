"""The whole configuration as frozen dataclasses. Defaults and a line on each key are in `verl/trainer/config`."""

from datetime import timedelta
from typing import Any, Literal

from verl.config import ActorRolloutRefConfig, CriticConfig, SodaConfig
from verl.config.base import AtLeastMinusOne, Count, NonNegative, Positive, PositiveFloat, settings

# What may be waited for at most, if not for ever; far beyond, the clocks of torch.distributed run over.
LONGEST_STALL = timedelta(days=7)


@settings
class DataConfig:
    """Prompts and teacher answers."""

    train_files: str | list[str]
    val_files: str | list[str] | None
    prompt_key: str
    response_key: str
    turns: Literal["none", "all", "last"]
    train_batch_size: Positive
    val_batch_size: Positive | None
    max_prompt_length: Positive
    max_response_length: Positive
    truncation: Literal["error", "left", "right", "middle"]
    filter_overlong_prompts: bool
    filter_overlong_prompts_workers: Positive | None
    on_bad_row: Literal["error", "skip"]
    special_token_text: Literal["text", "token"]
    cache_dir: str | None
    train_max_samples: int
    val_max_samples: int
    shuffle: bool
    seed: Count
    dataloader_num_workers: Count
    return_raw_chat: bool
    apply_chat_template_kwargs: dict[str, Any]


@settings
class KLControlConfig:
    """The coefficient of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"]
    kl_coef: NonNegative
    horizon: PositiveFloat
    target_kl: PositiveFloat


@settings
class AlgorithmConfig:
    """Advantages and the KL penalty in the reward."""

    adv_estimator: str
    norm_adv_by_std_in_grpo: bool
    gamma: float
    lam: float
    use_kl_in_reward: bool
    kl_penalty: str
    kl_ctrl: KLControlConfig
    task_reward_weight: float
    cut_answers: Literal["keep", "lowest", "leave_out"]
    min_group_std: NonNegative
    length_correction: bool
    rollout_is: Literal["token", "sequence"] | None
    rollout_is_threshold: PositiveFloat


@settings
class CustomRewardConfig:
    """A reward function of the user's own: `name` in the file `path`."""

    path: str | None
    name: str


@settings
class TrainerConfig:
    """The loop: how long, how often, where to."""

    project_name: str
    experiment_name: str
    total_epochs: Positive
    total_training_steps: Positive | None
    critic_warmup: int | Literal["auto"]
    warmup_use_sft: bool
    sft_monitor_freq: AtLeastMinusOne | None
    nnodes: Positive
    n_gpus_per_node: Positive
    rollout_ahead: Literal[0, 1]
    device: Literal["cpu", "cuda"]
    balance_batch: bool
    logger: str | list[str]
    default_local_dir: str
    default_hdfs_dir: str | None
    default_tensorboard_dir: str
    val_before_train: bool
    val_only: bool
    test_freq: int
    best_metric: str | None
    best_mode: Literal["max", "min"]
    early_stop_patience: Positive | None
    log_val_generations: Count
    save_val_samples: bool
    validation_data_dir: str | None
    rollout_data_dir: str | None
    max_skipped_steps: Positive
    on_alarm: Literal["warn", "stop", "off"]
    monitor_rules: str | None
    save_freq: int
    save_on_signal: bool
    async_save: bool
    profile_steps: list[Count] | None
    stall_warning: AtLeastMinusOne
    stall_timeout: AtLeastMinusOne
    max_actor_ckpt_to_keep: Positive | None
    max_critic_ckpt_to_keep: Positive | None
    resume_mode: Literal["auto", "disable", "resume_path"]
    resume_from_path: str | None

    @property
    def ranks(self) -> int:
        """Processes that train."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def collective_timeout(self) -> timedelta:
        """How long a rank waits for the others: longer than the driver does, which can say who keeps them waiting."""
        if self.stall_timeout == -1:
            return LONGEST_STALL
        return timedelta(seconds=self.stall_timeout, minutes=10)


@settings
class RayInitConfig:
    """The cluster to join or to start."""

    address: str | None
    num_cpus: Positive | None


@settings
class RayConfig:
    """Arguments for Ray."""

    ray_init: RayInitConfig


@settings
class RewardModelConfig:
    """Kept for scripts that switch it off."""

    enable: bool


@settings
class HybridActorRolloutRefConfig(ActorRolloutRefConfig):
    """The policy settings, with the key that names their only layout."""

    hybrid_engine: bool


@settings
class Config:
    """A whole run."""

    data: DataConfig
    actor_rollout_ref: HybridActorRolloutRefConfig
    critic: CriticConfig
    reward_model: RewardModelConfig
    custom_reward_function: CustomRewardConfig
    algorithm: AlgorithmConfig
    soda: SodaConfig
    trainer: TrainerConfig
    ray_kwargs: RayConfig

    @property
    def use_critic(self) -> bool:
        """Whether there is a discriminator: yes, unless `trainer.critic_warmup` is -1."""
        return self.trainer.critic_warmup == "auto" or self.trainer.critic_warmup >= 0

    @property
    def actor_shares(self) -> int:
        """The shares of a batch that the policy computes: one for each rank, or for each group of ranks that share the
        tokens of their rows (`ulysses_sequence_parallel_size`)."""
        return self.trainer.ranks // self.actor_rollout_ref.actor.ulysses_sequence_parallel_size

    @property
    def critic_shares(self) -> int:
        """The same of the discriminator."""
        return self.trainer.ranks // self.critic.ulysses_sequence_parallel_size

    @property
    def stage(self) -> str:
        """The stage's name, for people."""
        if self.soda.enable:
            return "SODA"
        if not self.use_critic:
            return "SeqKD"
        return "warmup" if self.use_sft or self.frozen_actor_steps > 0 else "GAD"

    @property
    def rollout_ranks(self) -> int:
        """Processes of engines on devices of their own; 0: engines share the processes that train."""
        return self.trainer.nnodes * self.actor_rollout_ref.rollout.n_gpus_per_node

    @property
    def processes_per_node(self) -> int:
        """Those that train and those of engines of their own; on GPU nodes each has a GPU."""
        return self.trainer.n_gpus_per_node + self.actor_rollout_ref.rollout.n_gpus_per_node

    @property
    def processes(self) -> int:
        """Of the run, on all nodes."""
        return self.trainer.nnodes * self.processes_per_node

    @property
    def frozen_actor_steps(self) -> int:
        """Steps that train the discriminator alone, at least; with `critic_warmup=auto` as many as its checks take. A
        warmup by SFT trains the actor from the first step on."""
        if self.trainer.critic_warmup == "auto":
            return self.critic.head_start.checks * self.critic.head_start.check_every
        return 0 if self.use_sft else max(0, self.trainer.critic_warmup)

    @property
    def use_reference(self) -> bool:
        """Whether a frozen reference is kept in memory: only where a KL term needs it, or pairs made after the first
        update (those made before it ask the policy, which is the reference then)."""
        if self.soda.enable:
            return self.soda.resample == "epoch"
        return not self.use_sft and (self.actor_rollout_ref.actor.use_kl_loss or self.algorithm.use_kl_in_reward)

    @property
    def sft_sample_freq(self) -> int:
        """SeqKD: steps between those that sample answers to be looked at; 0 or less: none does."""
        trainer = self.trainer
        return trainer.test_freq if trainer.sft_monitor_freq is None else trainer.sft_monitor_freq

    @property
    def validates(self) -> bool:
        """Whether answers to held-out prompts are looked at, at any time."""
        trainer = self.trainer
        due = trainer.val_only or trainer.val_before_train or trainer.test_freq > 0
        return self.data.val_files is not None and due

    @property
    def generates(self) -> bool:
        """Whether the student writes answers at any time: to be trained on, judged, validated or looked at. Only then
        is there an engine."""
        imitates_alone = self.use_sft and not self.use_critic and not self.soda.enable
        return not imitates_alone or self.validates or self.sft_sample_freq > 0

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy's log-probs before the update take a pass of their own: with one mini-batch and one epoch
        they are those of the update's own forward. Weights against the engine's log-probs are made of them before."""
        actor = self.actor_rollout_ref.actor
        if self.algorithm.rollout_is is not None:
            return True
        return actor.ppo_mini_batch_size != self.data.train_batch_size or actor.ppo_epochs != 1

    @property
    def use_sft(self) -> bool:
        """Whether the actor is trained on the teacher's answers."""
        return self.actor_rollout_ref.actor.use_sft_mode
