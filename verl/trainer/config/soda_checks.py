"""Settings of other stages that contradict SODA, which would ignore them or be undone by them."""

from __future__ import annotations

from collections.abc import Iterator

from verl.config.run import Config


def soda_conflicts(config: Config) -> Iterator[str]:
    """Sentences with a way out, as in `checks`; none without `soda.enable`."""
    if not config.soda.enable:
        return
    actor, algorithm, rollout = config.actor_rollout_ref.actor, config.algorithm, config.actor_rollout_ref.rollout
    if config.use_critic:
        yield (
            "soda.enable=True trains without a discriminator, and "
            f"trainer.critic_warmup={config.trainer.critic_warmup} asks for one: set it to -1 (stage=soda does)"
        )
    if config.use_sft:
        yield (
            "soda.enable=True and actor_rollout_ref.actor.use_sft_mode=True are two losses: choose one; "
            "soda.sft_coef adds SFT on the teacher's answers to SODA"
        )
    if actor.use_kl_loss:
        yield (
            "actor_rollout_ref.actor.use_kl_loss=True has no effect with soda.enable=True, whose loss holds the "
            "student to the reference by soda.beta: leave it off"
        )
    if rollout.n != 1:
        yield (
            f"actor_rollout_ref.rollout.n={rollout.n}: soda.enable=True pairs each teacher answer with one answer of "
            "the student; use 1"
        )
    unused = {
        "actor_rollout_ref.actor.entropy_coeff": (actor.entropy_coeff, 0),
        "actor_rollout_ref.actor.loss_agg_mode": (actor.loss_agg_mode, "token-mean"),
        "algorithm.use_kl_in_reward": (algorithm.use_kl_in_reward, False),
        "algorithm.task_reward_weight": (algorithm.task_reward_weight, 0),
        "actor_rollout_ref.actor.sft_anchor_coef": (actor.sft_anchor_coef, 0),
        "algorithm.norm_adv_by_std_in_grpo": (algorithm.norm_adv_by_std_in_grpo, True),
        "algorithm.min_group_std": (algorithm.min_group_std, 0),
        "algorithm.length_correction": (algorithm.length_correction, False),
        "algorithm.rollout_is": (algorithm.rollout_is, None),
        "trainer.sft_monitor_freq": (config.trainer.sft_monitor_freq, None),
    }
    for key, (value, default) in unused.items():
        if value != default:
            neutral = "null" if default is None else default
            yield f"{key}={value} has no effect with soda.enable=True; leave it at {neutral}"
