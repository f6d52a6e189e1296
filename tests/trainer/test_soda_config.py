"""SODA's settings: its stage, its keys, and what contradicts it."""

from __future__ import annotations

import pytest

from verl.trainer.config import ConfigError, compose_config

REQUIRED = ["data.train_files=train.parquet", "actor_rollout_ref.model.path=base", "trainer.experiment_name=exp"]
ACTOR = "actor_rollout_ref.actor"


def soda(*overrides: str):
    return compose_config([*REQUIRED, "stage=soda", *overrides])


def test_the_stage():
    config = soda()
    assert (config.soda.enable, config.soda.beta, config.soda.resample) == (True, 0.1, "once")
    assert (config.soda.sft_coef, config.soda.length_normalized) == (0.0, False)
    assert (config.use_critic, config.use_sft, config.frozen_actor_steps) == (False, False, 0)
    assert (config.actor_rollout_ref.actor.optim.lr, config.trainer.total_epochs) == (1e-6, 2)
    assert (config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.rollout.temperature) == (1, 0.8)
    assert config.data.train_batch_size == 256


@pytest.mark.parametrize("stage", ["seqkd", "warmup", "gad", "gad_short"])
def test_other_stages_have_none_of_it(stage):
    assert not compose_config([*REQUIRED, f"stage={stage}"]).soda.enable


def test_keys_have_their_effect():
    config = soda("soda.beta=0.5", "soda.resample=epoch", "soda.sft_coef=1", "+soda.length_normalized=True")
    assert (config.soda.beta, config.soda.resample) == (0.5, "epoch")
    assert (config.soda.sft_coef, config.soda.length_normalized) == (1.0, True)


def test_a_reference_is_kept_only_for_pairs_made_after_the_first_update():
    assert not soda().use_reference
    assert soda("soda.resample=epoch").use_reference


@pytest.mark.parametrize(
    "overrides",
    [
        # Nothing is computed from the probabilities that answers were drawn with.
        ["actor_rollout_ref.rollout.do_sample=False"],
        ["actor_rollout_ref.rollout.top_p=0.9", "actor_rollout_ref.rollout.top_k=50"],
        [f"{ACTOR}.ppo_epochs=2", f"{ACTOR}.ppo_mini_batch_size=64"],
    ],
)
def test_no_conflict(overrides):
    soda(*overrides)


CONFLICTS = {
    "discriminator": (["trainer.critic_warmup=0"], ["critic_warmup=0", "-1"]),
    "SFT": ([f"{ACTOR}.use_sft_mode=True"], ["use_sft_mode=True", "soda.sft_coef"]),
    "KL loss": ([f"{ACTOR}.use_kl_loss=True"], ["use_kl_loss=True", "soda.beta"]),
    "several answers": (["actor_rollout_ref.rollout.n=8"], ["rollout.n=8", "use 1"]),
    "entropy": ([f"{ACTOR}.entropy_coeff=0.01"], ["entropy_coeff=0.01", "leave it at 0"]),
    "aggregation": ([f"{ACTOR}.loss_agg_mode=seq-mean-token-sum"], ["loss_agg_mode", "leave it at token-mean"]),
    "KL in the reward": (["algorithm.use_kl_in_reward=True"], ["use_kl_in_reward=True", "no effect"]),
    "advantages": (["algorithm.norm_adv_by_std_in_grpo=False"], ["norm_adv_by_std_in_grpo=False", "no effect"]),
    "monitoring": (["trainer.sft_monitor_freq=1"], ["sft_monitor_freq=1", "leave it at null"]),
    "beta": (["soda.beta=0"], ["soda.beta", "greater than 0"]),
    "resampling": (["soda.resample=step"], ["soda.resample", "'once' or 'epoch'"]),
    "unknown": (["soda.betta=1"], ["soda.betta", "soda.beta"]),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict(name):
    overrides, parts = CONFLICTS[name]
    with pytest.raises(ConfigError) as caught:
        soda(*overrides)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert all(part in caught.value.problems[0] for part in parts), caught.value.problems


def test_without_a_discriminator_sft_or_soda_nothing_trains():
    with pytest.raises(ConfigError, match=r"nothing scores the answers.*soda\.enable=True"):
        soda("soda.enable=False", "actor_rollout_ref.rollout.n=8")
