"""The configuration as users meet it: keys of existing scripts, stages, refusals."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import verl.trainer.config as config_package
from verl.monitor.rules import OWN
from verl.trainer.config import Config, ConfigError, compose_config, normalize_overrides
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

REPOSITORY = Path(__file__).parents[2]
CONFIG_DIR = Path(config_package.__file__).parent
REQUIRED = ["data.train_files=train.parquet", "actor_rollout_ref.model.path=base", "trainer.experiment_name=exp"]
ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"

# Every key that existing stage scripts pass, as they write it, and what it must come to. The values differ from the
# defaults wherever more than one value is supported, and go together (8 ranks, prompts and answers of 512 + 256).
SCRIPT_KEYS: list[tuple[str, str, Any]] = [
    (f"{ACTOR}.entropy_coeff", "0.01", 0.01),
    (f"{ACTOR}.fsdp_config.optimizer_offload", "True", True),
    (f"{ACTOR}.fsdp_config.param_offload", "True", True),
    (f"{ACTOR}.grad_clip", "0.2", 0.2),
    (f"{ACTOR}.kl_loss_coef", "0.002", 0.002),
    (f"{ACTOR}.kl_loss_type", "k2", "k2"),
    (f"{ACTOR}.optim.lr", "3e-6", 3e-6),
    (f"{ACTOR}.ppo_max_token_len_per_gpu", "4096", 4096),
    (f"{ACTOR}.ppo_mini_batch_size", "32", 32),
    (f"{ACTOR}.ulysses_sequence_parallel_size", "1", 1),
    (f"{ACTOR}.use_dynamic_bsz", "False", False),
    (f"{ACTOR}.use_kl_loss", "False", False),
    (f"{MODEL}.enable_gradient_checkpointing", "True", True),
    (f"{MODEL}.path", "/models/student", "/models/student"),
    (f"{MODEL}.use_remove_padding", "False", False),
    ("actor_rollout_ref.ref.fsdp_config.param_offload", "True", True),
    (f"{ROLLOUT}.enforce_eager", "True", True),
    (f"{ROLLOUT}.free_cache_engine", "False", False),
    (f"{ROLLOUT}.gpu_memory_utilization", "0.7", 0.7),
    (f"{ROLLOUT}.n", "4", 4),
    (f"{ROLLOUT}.name", "hf", "hf"),
    (f"{ROLLOUT}.temperature", "0.9", 0.9),
    (f"{ROLLOUT}.tensor_model_parallel_size", "1", 1),
    ("algorithm.adv_estimator", "grpo", "grpo"),
    ("algorithm.kl_ctrl.kl_coef", "0.05", 0.05),
    ("critic.grad_clip", "0.3", 0.3),
    ("critic.model.path", "/models/reward", "/models/reward"),
    ("critic.model.use_remove_padding", "False", False),
    ("critic.optim.lr", "4e-6", 4e-6),
    ("critic.ppo_max_token_len_per_gpu", "9000", 9000),
    ("data.max_prompt_length", "512", 512),
    ("data.max_response_length", "256", 256),
    ("data.prompt_key", "messages", "messages"),
    ("data.train_batch_size", "64", 64),
    ("data.train_files", "[a.parquet,b.parquet]", ["a.parquet", "b.parquet"]),
    ("data.truncation", "left", "left"),
    ("data.val_batch_size", "16", 16),
    ("data.val_files", "val.parquet", "val.parquet"),
    ("trainer.critic_warmup", "5", 5),
    ("trainer.default_hdfs_dir", "null", None),
    ("trainer.default_local_dir", "/ckpt/run", "/ckpt/run"),
    ("trainer.experiment_name", "my-exp", "my-exp"),
    ("trainer.logger", "['console','wandb']", ["console", "wandb"]),
    ("trainer.n_gpus_per_node", "4", 4),
    ("trainer.nnodes", "2", 2),
    ("trainer.project_name", "proj", "proj"),
    ("trainer.save_freq", "25", 25),
    ("trainer.test_freq", "7", 7),
    ("trainer.total_epochs", "3", 3),
    ("trainer.val_before_train", "False", False),
    ("data.filter_overlong_prompts", "True", True),
    ("data.filter_overlong_prompts_workers", "8", 8),
    ("data.dataloader_num_workers", "2", 2),
    ("algorithm.use_kl_in_reward", "True", True),
    ("algorithm.gamma", "1.0", 1.0),
    ("algorithm.lam", "1.0", 1.0),
    ("algorithm.norm_adv_by_std_in_grpo", "False", False),
    (f"{ACTOR}.use_sft_mode", "False", False),
    (f"{ACTOR}.policy_loss.loss_mode", "vanilla", "vanilla"),
    (f"{ACTOR}.clip_ratio", "0.2", 0.2),
    (f"{ACTOR}.clip_ratio_low", "3e-4", 3e-4),
    (f"{ACTOR}.clip_ratio_high", "4e-4", 4e-4),
    (f"{ACTOR}.clip_ratio_c", "10.0", 10.0),
    (f"{ACTOR}.ppo_epochs", "2", 2),
    (f"{ACTOR}.ppo_micro_batch_size_per_gpu", "2", 2),
    (f"{ACTOR}.loss_agg_mode", "seq-mean-token-mean", "seq-mean-token-mean"),
    (f"{ACTOR}.fsdp_config.strategy", "fsdp2", "fsdp2"),
    (f"{ACTOR}.strategy", "fsdp", "fsdp"),
    (f"{ACTOR}.optim.lr_scheduler_type", "cosine", "cosine"),
    (f"{ACTOR}.optim.lr_warmup_steps", "6", 6),
    (f"{ACTOR}.optim.lr_warmup_steps_ratio", "0.1", 0.1),
    (f"{ROLLOUT}.max_model_len", "1024", 1024),
    (f"{ROLLOUT}.max_num_seqs", "64", 64),
    (f"{ROLLOUT}.max_num_batched_tokens", "4096", 4096),
    (f"{ROLLOUT}.enable_chunked_prefill", "False", False),
    (f"{ROLLOUT}.disable_log_stats", "False", False),
    (f"{ROLLOUT}.top_p", "1.0", 1.0),
    (f"{ROLLOUT}.top_k", "-1", -1),
    (f"{ROLLOUT}.log_prob_max_token_len_per_gpu", "5000", 5000),
    (f"{ROLLOUT}.val_kwargs.temperature", "0.6", 0.6),
    (f"{ROLLOUT}.val_kwargs.do_sample", "True", True),
    (f"{ROLLOUT}.val_kwargs.n", "2", 2),
    (f"{MODEL}.use_shm", "True", True),
    (f"{MODEL}.trust_remote_code", "True", True),
    ("critic.enable", "True", True),
    ("critic.strategy", "fsdp", "fsdp"),
    ("critic.optim.lr_scheduler_type", "wsd", "wsd"),
    ("critic.optim.lr_warmup_steps", "9", 9),
    ("critic.ppo_mini_batch_size", "16", 16),
    ("critic.ppo_micro_batch_size_per_gpu", "4", 4),
    ("critic.ppo_epochs", "3", 3),
    ("critic.use_dynamic_bsz", "False", False),
    ("critic.ulysses_sequence_parallel_size", "1", 1),
    ("critic.model.use_shm", "True", True),
    ("critic.model.enable_gradient_checkpointing", "True", True),
    ("critic.model.fsdp_config.fsdp_size", "-1", -1),
    ("critic.model.fsdp_config.param_offload", "True", True),
    ("critic.model.fsdp_config.optimizer_offload", "True", True),
    ("reward_model.enable", "False", False),
    ("trainer.warmup_use_sft", "False", False),
    ("trainer.default_tensorboard_dir", "/tb", "/tb"),
    ("trainer.best_metric", "val/sft_loss", "val/sft_loss"),
    ("trainer.best_mode", "min", "min"),
    ("trainer.early_stop_patience", "4", 4),
    ("trainer.log_val_generations", "11", 11),
    ("trainer.total_training_steps", "33", 33),
    ("trainer.resume_mode", "resume_path", "resume_path"),
    ("trainer.resume_from_path", "/ckpt/run/global_step_5", "/ckpt/run/global_step_5"),
    ("trainer.val_only", "True", True),
    ("trainer.save_val_samples", "False", False),
    ("trainer.validation_data_dir", "/val", "/val"),
    ("trainer.rollout_data_dir", "/roll", "/roll"),
    ("trainer.max_actor_ckpt_to_keep", "3", 3),
    ("trainer.max_critic_ckpt_to_keep", "1", 1),
    ("trainer.balance_batch", "False", False),
    ("trainer.device", "cpu", "cpu"),
]
# Old names: same effect as the key on the right.
ALIASES: list[tuple[str, str, str, Any]] = [
    (f"{ACTOR}.optim.warmup_style", "cosine", f"{ACTOR}.optim.lr_scheduler_type", "cosine"),
    ("critic.optim.warmup_style", "cosine", "critic.optim.lr_scheduler_type", "cosine"),
    ("critic.optim.lr_scheduler.type", "wsd", "critic.optim.lr_scheduler_type", "wsd"),
    ("critic.optim.lr_scheduler.warmup_steps", "12", "critic.optim.lr_warmup_steps", 12),
    ("critic.optim.lr_scheduler.total_steps", "77", "critic.optim.total_training_steps", 77),
]


def with_required(*overrides: str) -> Config:
    return compose_config([*REQUIRED, *overrides])


@functools.cache
def defaults() -> Config:
    return with_required()


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def problems(*overrides: str, required: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_config([*(REQUIRED if required else []), *overrides])
    message = str(caught.value)
    found = caught.value.problems
    assert message.startswith(f"{len(found)} problem(s)")
    assert all(problem in message for problem in found)
    return found


def raw(*overrides: str) -> dict[str, Any]:
    """What the YAML files alone say, by Hydra without any code of ours."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_container(compose("ppo_trainer", overrides=list(overrides)), resolve=False)


# ---- keys of existing scripts


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_every_script_key_has_its_effect(prefix):
    config = compose_config([f"{prefix}{key}={text}" for key, text, _ in SCRIPT_KEYS])
    wrong = {key: value_at(config, key) for key, _, expected in SCRIPT_KEYS if value_at(config, key) != expected}
    assert wrong == {}


def test_ranks_that_share_sequences_are_grouped_for_actor_and_critic_apart():
    config = compose_config(
        [*REQUIRED, "trainer.n_gpus_per_node=8", f"{ACTOR}.ulysses_sequence_parallel_size=2",
         "critic.ulysses_sequence_parallel_size=4", "data.train_batch_size=4"]
    )  # fmt: skip
    assert (config.actor_shares, config.critic_shares) == (4, 2)
    assert config.actor_rollout_ref.ref.ulysses_sequence_parallel_size == 2


def test_script_keys_differ_from_the_defaults():
    # Otherwise the test above could pass without the override doing anything. These have one supported value.
    config = defaults()
    same = {key for key, _, expected in SCRIPT_KEYS if value_at(config, key) == expected}
    assert same == {
        f"{ACTOR}.ulysses_sequence_parallel_size",  # above 1 contradicts use_remove_padding=False
        f"{ACTOR}.use_sft_mode",  # seqkd sets it, see the stages
        f"{ACTOR}.fsdp_config.strategy",  # differs from the actor.strategy it would follow
        f"{ROLLOUT}.name",
        f"{ROLLOUT}.tensor_model_parallel_size",
        f"{ROLLOUT}.top_p",
        f"{ROLLOUT}.top_k",
        "algorithm.adv_estimator",
        "algorithm.gamma",
        "algorithm.lam",
        "critic.ulysses_sequence_parallel_size",
        "critic.model.fsdp_config.fsdp_size",
        "reward_model.enable",
        "trainer.default_hdfs_dir",
        "trainer.warmup_use_sft",
        "trainer.device",
    }


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(("alias", "text", "key", "expected"), ALIASES)
def test_alias(prefix, alias, text, key, expected):
    assert value_at(defaults(), key) != expected
    assert value_at(with_required(f"{prefix}{alias}={text}"), key) == expected


def test_an_alias_reaches_its_own_model_only():
    config = with_required("critic.optim.warmup_style=cosine")
    assert config.actor_rollout_ref.actor.optim.lr_scheduler_type == "constant"


@pytest.mark.parametrize("argument", ["stage=seqkd", "+stage=seqkd", "++stage=seqkd"])
def test_a_stage_is_chosen_with_or_without_plus(argument):
    assert normalize_overrides([argument]) == ["stage=seqkd"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("~data.seed", "only set"),
        ("data=x.parquet", "one by one"),
        ("algorithm=5", "one by one"),
        ("reward_model=[]", "one by one"),
        ("gad", "expected KEY=VALUE"),
        ("=5", "expected KEY=VALUE"),
        ("trainer.logger.accuracy=[]", r"trainer\.logger is a list; set it whole, trainer\.logger=\[A,B\]"),
        ("++trainer.logger.0=console", r"trainer\.logger is a list"),
        ("critic.optim.betas.x.y=1", r"critic\.optim\.betas is a list"),
        ("+actor_rollout_ref.model.target_modules.a=1", r"model\.target_modules is a list"),
    ],
)
def test_keys_are_not_removed_and_groups_not_replaced(argument, said):
    with pytest.raises(ConfigError, match=said):
        normalize_overrides([argument])


def test_groups_flags_and_hydra_settings_pass_unchanged():
    arguments = ["stage=seqkd", "--help", "--cfg", "job", "hydra.run.dir=x", "-m"]
    assert normalize_overrides(arguments) == arguments


def test_values_with_signs_of_their_own():
    # Hydra wants an equals sign inside a value quoted.
    config = with_required("trainer.default_local_dir='/a=b/c'", f"+{MODEL}.override_config={{rope_theta: 5}}")
    assert config.trainer.default_local_dir == "/a=b/c"
    assert config.actor_rollout_ref.model.override_config == {"rope_theta": 5}


def test_free_dictionaries_take_any_key():
    config = with_required(
        "data.apply_chat_template_kwargs.enable_thinking=False", f"+{MODEL}.override_config.rope.theta=5"
    )
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    assert config.actor_rollout_ref.model.override_config == {"rope": {"theta": 5}}


def test_settings_that_follow_others():
    config = with_required(
        "data.train_batch_size=32",
        "data.max_prompt_length=300",
        "data.max_response_length=200",
        "data.seed=9",
        f"{ACTOR}.ppo_max_token_len_per_gpu=777",
        f"{ACTOR}.fsdp_config.dtype=bfloat16",
        f"{ACTOR}.strategy=fsdp",
        "trainer.project_name=p",
    )
    actor, rollout, critic = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.critic
    assert (actor.ppo_mini_batch_size, critic.ppo_mini_batch_size) == (32, 32)
    assert (rollout.prompt_length, rollout.response_length, rollout.seed) == (300, 200, 9)
    assert rollout.log_prob_max_token_len_per_gpu == 777
    assert {rollout.dtype, critic.model.fsdp_config.dtype, config.actor_rollout_ref.ref.fsdp_config.dtype} == {
        "bfloat16"
    }
    assert {actor.fsdp_config.strategy, critic.strategy, critic.model.fsdp_config.strategy} == {"fsdp"}
    assert critic.model.path == "base"
    assert config.trainer.default_local_dir == "checkpoints/p/exp"
    assert config.trainer.default_tensorboard_dir == "checkpoints/p/exp/tensorboard"


# ---- stages (the table in the project's brief)

STAGES = {
    # critic_warmup, SFT, KL loss, actor lr, critic lr (None: no critic), epochs, temperature, SFT anchor
    "seqkd": (-1, True, False, 5e-6, None, 4, 0.8, 0),
    "warmup": (10, False, True, 1e-6, 5e-6, 2, 1, 0.3),
    "gad": (0, False, True, 1e-6, 1e-6, 2, 1, 0.3),
    "gad_short": (10, False, True, 3e-6, 1e-6, 8, 0.8, 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage):
    config = with_required(f"stage={stage}")
    warmup, sft, kl, actor_lr, critic_lr, epochs, temperature, anchor = STAGES[stage]
    actor = config.actor_rollout_ref.actor
    assert config.trainer.critic_warmup == warmup
    assert (actor.use_sft_mode, actor.use_kl_loss) == (sft, kl)
    assert actor.optim.lr == actor_lr
    assert config.trainer.total_epochs == epochs
    assert config.use_critic == (critic_lr is not None)
    assert (config.use_sft, config.use_reference) == (sft, kl)
    if critic_lr is not None:
        assert config.critic.optim.lr == critic_lr
        assert (actor.kl_loss_coef, actor.kl_loss_type) == (0.001, "low_var_kl")
        assert actor.policy_loss.loss_mode == "gspo"
        assert actor.clip_ratio == 0.1
        assert config.algorithm.adv_estimator == "grpo"
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature, actor.sft_anchor_coef) == (8, temperature, anchor)
    assert config.data.train_batch_size == (128 if stage == "gad_short" else 256)


def test_stage_gad_short_is_for_short_answers():
    config = with_required("stage=gad_short")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.max_response_length, rollout.response_length, rollout.max_model_len) == (256, 256, 2048)
    assert config.data.max_prompt_length + config.data.max_response_length <= rollout.max_model_len
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.1, 0.1)


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_wins_over_the_stage(order):
    arguments = ["stage=warmup", "trainer.critic_warmup=3", "critic.optim.lr=9e-6"][::order]
    config = with_required(*arguments)
    assert (config.trainer.critic_warmup, config.critic.optim.lr) == (3, 9e-6)
    assert config.trainer.total_epochs == 2


def test_the_default_stage_is_gad():
    assert defaults() == with_required("stage=gad")


def test_discriminator_constants():
    assert with_required().critic.discriminator.loss == "bradley_terry"
    assert with_required().critic.discriminator.constants() == {}
    assert with_required("stage=gad_short").critic.discriminator.loss == "ranking"
    config = with_required("critic.discriminator.loss=ranking", "critic.discriminator.ranking.temperature=3")
    assert config.critic.discriminator.constants() == {
        "ranking_coef": 1.5,
        "temperature": 3.0,
        "clamp": 10.0,
        "reg_coef": 0.005,
        "reg_on": "centre",
        "diff_limit": 1.5,
        "diff_coef": 0.5,
    }
    hinge = {"margin": 1.0, "ranking_coef": 0.5, "temperature": 2.0, "clamp": 10.0}
    assert with_required("critic.discriminator.loss=hinge").critic.discriminator.constants() == hinge
    two_sided = with_required("critic.discriminator.loss=two_sided_hinge").critic.discriminator.constants()
    assert two_sided == hinge | {"upper": 5.0}


def test_the_reference_is_for_a_kl_term():
    assert defaults().use_reference
    assert not with_required(f"{ACTOR}.use_kl_loss=False").use_reference
    assert with_required(f"{ACTOR}.use_kl_loss=False", "algorithm.use_kl_in_reward=True").use_reference


def test_settings_are_frozen():
    config = defaults()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.trainer.nnodes = 2


# ---- YAML and dataclasses know the same keys


def keys_of_yaml(tree: dict[str, Any], free: set[str], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in free:
            keys |= keys_of_yaml(value, free, key + ".")
        else:
            keys.add(key)
    return keys


def keys_of_classes(settings: type, prefix: str = "") -> tuple[set[str], set[str]]:
    """Leaves, and those of them that are free dictionaries."""
    leaves, free = set(), set()
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            below = keys_of_classes(kind, key + ".")
            leaves, free = leaves | below[0], free | below[1]
        else:
            leaves.add(key)
            if kind == dict[str, Any]:
                free.add(key)
    return leaves, free


@pytest.mark.parametrize("stage", STAGES)
def test_yaml_and_dataclasses_know_the_same_keys(stage):
    leaves, free = keys_of_classes(Config)
    assert len(leaves) > 100
    assert keys_of_yaml(raw(f"stage={stage}"), free) == leaves


def test_dataclasses_hold_no_defaults():
    def fields_with_defaults(settings: type) -> list[str]:
        found = []
        for field in dataclasses.fields(settings):
            kind = get_type_hints(settings)[field.name]
            if dataclasses.is_dataclass(kind):
                found += fields_with_defaults(kind)
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
                found.append(f"{settings.__name__}.{field.name}")
        return found

    assert fields_with_defaults(Config) == []


# ---- refusals


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.total_epoch=1", "trainer.total_epochs"),
        ("data.train_batch_sizes=3", "data.train_batch_size"),
        ("+critic.discriminator.ranking.clmp=1", "critic.discriminator.ranking.clamp"),
        ("critic.lr=1e-6", "critic.optim.lr"),  # the right name in the wrong place
        ("++trainer.val_files=x", "data.val_files"),
        ("actor_rolout_ref.actor.grad_clip=1", "actor_rollout_ref.actor.grad_clip"),
    ],
)
def test_unknown_key_names_the_nearest(override, nearest):
    key = override.lstrip("+").split("=")[0]
    assert problems(override) == [f"unknown key {key}; did you mean {nearest}?"]


def test_unknown_key_like_nothing():
    assert problems("+zzz.qqq=1") == ["unknown key zzz.qqq"]


def test_what_is_not_to_be_left_open():
    assert problems(f"{ACTOR}.entropy_coeff=???") == [f"{ACTOR}.entropy_coeff is not set: give it a value"]


@pytest.mark.parametrize("value", ["${", "a${b", "[${,:}]"])
def test_a_reference_that_is_none_is_a_sentence(value):
    (problem,) = problems(f"trainer.logger={value}")
    assert problem.startswith("Error merging override ++trainer.logger=")


def test_what_is_missing():
    found = problems(required=False)
    assert len(found) == 3
    for key in ("data.train_files", f"{MODEL}.path", "trainer.experiment_name"):
        assert sum(problem.startswith(f"{key} is not set") for problem in found) == 1


def test_several_problems_are_listed_together():
    found = problems(
        "data.train_files=x",
        "trainer.experiment_name=e",
        "trainer.total_epoch=1",
        "data.shufle=1",
        "trainer.nnodes=two",
        f"{ACTOR}.optim.lr=-1",
        required=False,
    )
    assert len(found) == 5
    for part in (f"{MODEL}.path", "trainer.total_epoch;", "data.shufle;", "trainer.nnodes:", f"{ACTOR}.optim.lr:"):
        assert sum(part in problem for problem in found) == 1, part


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.nnodes=two", ["valid integer", "'two'"]),
        ("trainer.save_freq=2.5", ["valid integer", "2.5"]),
        ("trainer.nnodes=0", ["greater than 0", "got 0"]),
        ("data.shuffle=maybe", ["valid boolean", "'maybe'"]),
        (f"{ACTOR}.optim.lr=-1", ["greater than or equal to 0", "-1"]),
        (f"{ACTOR}.optim.lr=fast", ["valid number", "'fast'"]),
        ("critic.optim.betas=[0.9,2]", ["less than 1", "2"]),
        (f"{ROLLOUT}.val_kwargs.n=0", ["greater than 0"]),
        (f"{ACTOR}.loss_agg_mode=mean", ["token-mean", "'mean'"]),
        (f"{ACTOR}.strategy=ddp", ["fsdp2", "'ddp'"]),
        ("data.truncation=none", ["middle", "'none'"]),
        ("critic.discriminator.pooling=max", ["last_token", "'max'"]),
        ("critic.discriminator.ranking.temperature=0", ["greater than 0"]),
        ("trainer.resume_mode=always", ["resume_path", "'always'"]),
        ("trainer.max_actor_ckpt_to_keep=0", ["greater than 0"]),
        ("trainer.best_mode=least", ["max", "'least'"]),
        ("trainer.early_stop_patience=0", ["greater than 0"]),
        ("trainer.total_training_steps=0", ["greater than 0"]),
        ("trainer.device=tpu", ["cuda", "'tpu'"]),
    ],
)
def test_type_errors(override, parts):
    found = [problem for problem in problems(override) if problem.startswith(override.split("=")[0] + ":")]
    assert len(found) == 1
    assert all(part in found[0] for part in parts), found


# Each conflict: what to override, and one problem that must hold all the parts.
CONFLICTS: dict[str, tuple[list[str], list[str]]] = {
    "weights that scale down what agrees": (
        ["algorithm.rollout_is=token", "algorithm.rollout_is_threshold=0.5"],
        ["algorithm.rollout_is_threshold=0.5", "use 1 or more"],
    ),
    "ahead without devices for it": (
        ["trainer.rollout_ahead=1"],
        ["trainer.rollout_ahead=1 needs devices", "actor_rollout_ref.rollout.n_gpus_per_node=0"],
    ),
    "devices for nobody": (
        ["actor_rollout_ref.rollout.n_gpus_per_node=1"],
        ["actor_rollout_ref.rollout.n_gpus_per_node=1", "would be idle", "trainer.rollout_ahead=1"],
    ),
    "ahead of SeqKD": (
        ["stage=seqkd", "trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1"],
        ["trainer.rollout_ahead=1", "SeqKD trains on none that are written on the way"],
    ),
    "ahead of SODA": (
        ["stage=soda", "trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1"],
        ["trainer.rollout_ahead=1", "SODA trains on none that are written on the way"],
    ),
    "an engine over more devices than it has": (
        [
            "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
            "trainer.n_gpus_per_node=2",
            "trainer.rollout_ahead=1",
            "actor_rollout_ref.rollout.n_gpus_per_node=3",
        ],
        ["tensor_model_parallel_size=2 does not divide actor_rollout_ref.rollout.n_gpus_per_node=3"],
    ),
    "verl's split layout in turn": (
        ["actor_rollout_ref.hybrid_engine=False"],
        ["actor_rollout_ref.hybrid_engine=False is not supported", "without trainer.rollout_ahead=1"],
    ),
    "weights of a policy loss that SFT has not": (
        ["stage=seqkd", "algorithm.rollout_is=sequence"],
        ["algorithm.rollout_is=sequence has no effect", "use_sft_mode=True"],
    ),
    "batch over ranks": (
        ["data.train_batch_size=10", "trainer.nnodes=2", "trainer.n_gpus_per_node=2"],
        ["data.train_batch_size=10", "4 ranks"],
    ),
    "actor mini-batch": (
        ["data.train_batch_size=10", f"{ACTOR}.ppo_mini_batch_size=4", "critic.ppo_mini_batch_size=10"],
        [f"{ACTOR}.ppo_mini_batch_size=4", "train_batch_size=10"],
    ),
    "critic mini-batch": (
        ["data.train_batch_size=10", "critic.ppo_mini_batch_size=4"],
        ["critic.ppo_mini_batch_size=4", "train_batch_size=10"],
    ),
    "mini-batch larger than the batch": (
        ["data.train_batch_size=10", "critic.ppo_mini_batch_size=20"],
        ["critic.ppo_mini_batch_size=20", "train_batch_size=10"],
    ),
    "actor mini-batch over ranks": (
        ["trainer.n_gpus_per_node=4", f"{ACTOR}.ppo_mini_batch_size=2", "critic.ppo_mini_batch_size=4"],
        [f"{ACTOR}.ppo_mini_batch_size=2", "4 ranks"],
    ),
    "critic mini-batch over ranks": (
        ["trainer.n_gpus_per_node=4", "critic.ppo_mini_batch_size=2"],
        ["critic.ppo_mini_batch_size=2", "4 ranks"],
    ),
    # 2048 + 1536 = 3584
    "actor budget": (
        [f"{ACTOR}.ppo_max_token_len_per_gpu=3583", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=3584"],
        [f"{ACTOR}.ppo_max_token_len_per_gpu=3583", "3584"],
    ),
    "log-prob budget": (
        [f"{ROLLOUT}.log_prob_max_token_len_per_gpu=3583"],
        [f"{ROLLOUT}.log_prob_max_token_len_per_gpu=3583", "3584"],
    ),
    "critic budget": (["critic.ppo_max_token_len_per_gpu=3583"], ["critic.ppo_max_token_len_per_gpu=3583", "3584"]),
    "model length": ([f"{ROLLOUT}.max_model_len=3583"], ["max_model_len=3583", "3584"]),
    "actor micro-batch": (
        [f"{ACTOR}.use_dynamic_bsz=False", "critic.use_dynamic_bsz=True", f"{ROLLOUT}.log_prob_use_dynamic_bsz=True"],
        [f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu"],
    ),
    "critic micro-batch": (
        ["critic.use_dynamic_bsz=False"],
        ["critic.use_dynamic_bsz=False", "critic.ppo_micro_batch_size_per_gpu"],
    ),
    "log-prob micro-batch": (
        [f"{ROLLOUT}.log_prob_use_dynamic_bsz=False"],
        [f"{ROLLOUT}.log_prob_use_dynamic_bsz=False", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"],
    ),
    "advantage": (["algorithm.adv_estimator=gae"], ["algorithm.adv_estimator=gae", "grpo"]),
    "policy loss": ([f"{ACTOR}.policy_loss.loss_mode=sapo"], ["loss_mode=sapo", "gspo", "vanilla"]),
    "rollout": ([f"{ROLLOUT}.name=sglang"], [f"{ROLLOUT}.name=sglang", "hf"]),
    "logger": (["trainer.logger=[console,clearml]"], ["trainer.logger=clearml", "tensorboard"]),
    "one logger": (["trainer.logger=clearml"], ["trainer.logger=clearml", "tensorboard"]),
    "critic_warmup": (["trainer.critic_warmup=-2", "stage=seqkd"], ["trainer.critic_warmup=-2", "-1"]),
    "critic off": (["critic.enable=False"], ["critic.enable=False", "critic_warmup=0"]),
    "critic on": (["critic.enable=True", "stage=seqkd"], ["critic.enable=True", "critic_warmup=-1"]),
    "nothing scores": (["trainer.critic_warmup=-1"], ["critic_warmup=-1", "use_sft_mode=True"]),
    "nothing to score": ([f"{ACTOR}.use_sft_mode=True"], ["use_sft_mode=True", "critic_warmup=-1"]),
    "warmup by SFT without a discriminator": (
        ["trainer.warmup_use_sft=True", "stage=seqkd"],
        ["trainer.warmup_use_sft=True", "critic_warmup"],
    ),
    "warmup by SFT without SFT": (
        ["trainer.warmup_use_sft=True", f"{ACTOR}.use_sft_mode=False"],
        ["trainer.warmup_use_sft=True", "use_sft_mode=True"],
    ),
    "discriminator loss": (["critic.discriminator.loss=gan"], ["critic.discriminator.loss", "'gan'", "ranking"]),
    "discriminator loss file": (
        ["critic.discriminator.loss=/nowhere/mine.py:loss"],
        ["critic.discriminator.loss", "no file /nowhere/mine.py"],
    ),
    "constants of nobody": (["critic.discriminator.custom={margin: 2}"], ["discriminator.custom", "bradley_terry"]),
    "temperature of a loss without one": (
        ["critic.discriminator.loss=bradley_terry", "critic.discriminator.adaptive_temperature.enable=True"],
        ["adaptive_temperature", "bradley_terry"],
    ),
    # 0.001 of mini-batches of 256 prompts: a quarter of a group.
    "replay of nothing": (
        ["critic.replay.capacity=100000", "critic.replay.fraction=0.001"],
        ["critic.replay.fraction=0.001", "256"],
    ),
    # Half of the batch: 256 past groups of 8 answers.
    "replay that cannot fill a step": (["critic.replay.capacity=2047"], ["critic.replay.capacity=2047", "2048"]),
    "task reward without a function": (["algorithm.task_reward_weight=1"], ["task_reward_weight=1", "path"]),
    "task reward file": (["custom_reward_function.path=/nowhere/r.py"], ["custom_reward_function", "/nowhere/r.py"]),
    "validation only": (["trainer.val_only=True"], ["val_only=True", "data.val_files"]),
    "group of one": ([f"{ROLLOUT}.n=1"], [f"{ROLLOUT}.n=1", "2 or more"]),
    "greedy training": ([f"{ROLLOUT}.do_sample=False", f"{ROLLOUT}.n=2"], ["do_sample=False", "n answers"]),
    "top_p": ([f"{ROLLOUT}.top_p=0.9"], ["top_p=0.9"]),
    "top_k": ([f"{ROLLOUT}.top_k=50"], ["top_k=50"]),
    "temperature": ([f"{ROLLOUT}.temperature=0"], ["actor_rollout_ref.rollout: ", "temperature", "0"]),
    "validation temperature": (
        [f"{ROLLOUT}.val_kwargs.do_sample=True"],
        ["actor_rollout_ref.rollout.val_kwargs: ", "temperature"],
    ),
    "greedy copies": ([f"{ROLLOUT}.val_kwargs.n=3"], ["val_kwargs", "n=3", "3 copies"]),
    "KL loss": ([f"{ACTOR}.kl_loss_type=full"], [f"{ACTOR}.kl_loss_type", "'full'", "low_var_kl"]),
    "KL in the reward": (
        ["algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=k9"],
        ["algorithm.kl_penalty", "'k9'", "low_var_kl"],
    ),
    "a name that leads up": (["trainer.experiment_name=../../../x"], ["trainer.experiment_name='../../../x'", "'..'"]),
    "a name that leads up from within": (["trainer.project_name=a/../b"], ["trainer.project_name='a/../b'"]),
    "a name that is the folder": (["trainer.experiment_name=."], ["trainer.experiment_name='.'"]),
    "a name from the root": (["trainer.experiment_name=/tmp/x"], ["trainer.experiment_name='/tmp/x'"]),
    "no name": (["trainer.experiment_name=''"], ["trainer.experiment_name=''"]),
    "a name of blanks": (["trainer.experiment_name='  '"], ["trainer.experiment_name='  '"]),
    "a name of two lines": (["trainer.experiment_name='a\nb'"], ["trainer.experiment_name='a\\nb'", "line breaks"]),
    "a name of 300 letters": (
        [f"trainer.experiment_name={'a' * 300}"],
        ["trainer.experiment_name", "at most 200 bytes"],
    ),
    "a warning after the end": (
        ["trainer.stall_timeout=600"],
        ["trainer.stall_warning=600 warns of nothing", "trainer.stall_timeout=600"],
    ),
    "no time at all": (["trainer.stall_timeout=0"], ["trainer.stall_timeout=0: expected a number of seconds, or -1"]),
    "a stall of years": (["trainer.stall_timeout=99999999999999"], ["stall_timeout=99999999999999", "at most 7 days"]),
    "rules that nobody reads": (
        ["trainer.on_alarm=off", f"trainer.monitor_rules={OWN}"],
        ["trainer.monitor_rules", "trainer.on_alarm=off"],
    ),
    "an alarm that nobody would remember": (
        ["trainer.on_alarm=stop", "trainer.logger=[console]"],
        ["trainer.on_alarm=stop needs the file logger"],
    ),
    "resume without a path": (["trainer.resume_mode=resume_path"], ["resume_path", "trainer.resume_from_path"]),
    "path without resume": (["trainer.resume_from_path=/x"], ["resume_from_path", "resume_mode=auto"]),
    "best without data": (["trainer.best_metric=val/x"], ["best_metric=val/x", "data.val_files"]),
    "best without validation": (
        ["trainer.best_metric=val/x", "data.val_files=v", "trainer.test_freq=-1", "trainer.val_before_train=False"],
        ["best_metric=val/x", "test_freq=-1", "val_before_train=False"],
    ),
    "the worst loss": (
        ["trainer.best_metric=val/sft_loss", "data.val_files=v"],
        ["val/sft_loss", "best_mode=max", "best_mode=min"],
    ),
    "patience for nothing": (["trainer.early_stop_patience=3"], ["early_stop_patience=3", "trainer.best_metric"]),
    "patience without validation": (
        ["trainer.early_stop_patience=3", "trainer.best_metric=val/x", "data.val_files=v", "trainer.test_freq=-1"],
        ["early_stop_patience=3", "test_freq=-1"],
    ),
    "a number that is none": ([f"{ACTOR}.entropy_coeff=nan"], [f"{ACTOR}.entropy_coeff=nan", "fp32"]),
    "a number beyond fp32": (["soda.beta=1e39"], ["soda.beta=1e+39", "3.4e+38"]),
    "an infinite number": ([f"{ACTOR}.clip_ratio_c=inf"], [f"{ACTOR}.clip_ratio_c=inf", "3.4e+38"]),
    "an integer beyond 64 bits": (
        [f"trainer.total_training_steps={2**63}"],
        ["total_training_steps=9223372036854775808", "64 bits"],
    ),
    # AdamW's first step is 10 * lr: 3.5e37 * 10 is above the largest number of fp32, 3.4028e38.
    "a rate whose steps are beyond fp32": (
        [f"{ACTOR}.optim.lr=3.5e37"],
        [f"{ACTOR}.optim.lr=3.5e+37", "below 3.4e+37"],
    ),
    "a critic's rate": (["critic.optim.lr=1e38"], ["critic.optim.lr=1e+38", "below 3.4e+37"]),
    "a decay beyond fp32": (
        [f"{ACTOR}.optim.lr=1e30", f"{ACTOR}.optim.weight_decay=1e9"],
        [f"{ACTOR}.optim.lr=1e+30", "weight_decay=1000000000.0", "below 3.4e+29"],
    ),
    "hdfs": (["trainer.default_hdfs_dir=hdfs://x"], ["default_hdfs_dir=hdfs://x", "null"]),
    "gamma": (["algorithm.gamma=0.9"], ["algorithm.gamma=0.9", "1.0"]),
    "lam": (["algorithm.lam=0.95"], ["algorithm.lam=0.95", "1.0"]),
    "reward model": (["reward_model.enable=True"], ["reward_model.enable=True", "discriminator"]),
    "layout": (["actor_rollout_ref.hybrid_engine=False"], ["hybrid_engine=False"]),
    "tensor parallel": ([f"{ROLLOUT}.tensor_model_parallel_size=2"], ["tensor_model_parallel_size=2", "use 1"]),
    "actor mesh": ([f"{ACTOR}.fsdp_config.fsdp_size=2"], [f"{ACTOR}.fsdp_config.fsdp_size=2", "-1"]),
    "ref mesh": (
        ["actor_rollout_ref.ref.fsdp_config.fsdp_size=2"],
        ["actor_rollout_ref.ref.fsdp_config.fsdp_size=2", "-1"],
    ),
    "critic mesh": (["critic.model.fsdp_config.fsdp_size=2"], ["critic.model.fsdp_config.fsdp_size=2", "-1"]),
    "actor Ulysses": (
        [f"{ACTOR}.ulysses_sequence_parallel_size=2", "trainer.n_gpus_per_node=3"],
        [f"{ACTOR}.ulysses_sequence_parallel_size=2", "3 ranks", "use a divisor"],
    ),
    "critic Ulysses": (
        ["critic.ulysses_sequence_parallel_size=4", "trainer.n_gpus_per_node=2"],
        ["critic.ulysses_sequence_parallel_size=4", "2 ranks", "use a divisor"],
    ),
    "Ulysses of the reference": (
        ["actor_rollout_ref.ref.ulysses_sequence_parallel_size=2", "trainer.n_gpus_per_node=2"],
        ["actor_rollout_ref.ref.ulysses_sequence_parallel_size=2", "the actor's, 1"],
    ),
    "Ulysses of padded rows": (
        [f"{ACTOR}.ulysses_sequence_parallel_size=2", f"{MODEL}.use_remove_padding=False", "trainer.n_gpus_per_node=2"],
        [f"{ACTOR}.ulysses_sequence_parallel_size=2", f"{MODEL}.use_remove_padding=False"],
    ),
    "mini-batch over groups": (
        [
            "critic.ulysses_sequence_parallel_size=2",
            "trainer.n_gpus_per_node=6",
            "data.train_batch_size=12",
            f"{ACTOR}.ppo_mini_batch_size=12",
            "critic.ppo_mini_batch_size=4",
        ],
        ["critic.ppo_mini_batch_size=4", "3 groups of 2 ranks"],
    ),
    "budget of a group": (
        [
            f"{ACTOR}.ulysses_sequence_parallel_size=2",
            "trainer.n_gpus_per_node=2",
            "data.max_prompt_length=1000",
            "data.max_response_length=1001",
            f"{ACTOR}.ppo_max_token_len_per_gpu=1000",
            f"{ROLLOUT}.log_prob_max_token_len_per_gpu=1001",
        ],
        [f"{ACTOR}.ppo_max_token_len_per_gpu=1000", "over 2 ranks", "2001", "at least 1001"],
    ),
    # The vanilla loss raises on this value at its first update; it has to be found before anything starts.
    "dual clip": (
        [f"{ACTOR}.policy_loss.loss_mode=vanilla", f"{ACTOR}.clip_ratio_c=0.5"],
        ["clip_ratio_c", "0.5"],
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict(name):
    overrides, parts = CONFLICTS[name]
    found = problems(*overrides)
    assert sum(all(part in problem for part in parts) for problem in found) == 1, found
    alone = name not in ("batch over ranks", "greedy training")  # these two set off a second one as well
    assert not alone or len(found) == 1, found


def test_conflicts_are_listed_together():
    found = problems(f"{ROLLOUT}.n=1", "algorithm.gamma=0.5", "trainer.logger=clearml", f"{ROLLOUT}.max_model_len=9")
    assert len(found) == 4


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        # Just enough.
        [f"{ACTOR}.ppo_max_token_len_per_gpu=3584", f"{ROLLOUT}.max_model_len=3584"],
        ["data.train_batch_size=12", "trainer.n_gpus_per_node=4", "critic.ppo_mini_batch_size=4"],
        [f"{ROLLOUT}.n=2"],
        # A budget that is not used may be anything; so may the critic's, without one.
        [
            f"{ACTOR}.use_dynamic_bsz=False",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=1",
            "critic.ppo_micro_batch_size_per_gpu=8",
            f"{ACTOR}.ppo_max_token_len_per_gpu=1",
            "critic.ppo_max_token_len_per_gpu=1",
        ],
        ["stage=seqkd", "critic.ppo_mini_batch_size=7", "critic.ppo_max_token_len_per_gpu=1"],
        # Without a discriminator, answers are for looking at only.
        ["stage=seqkd", f"{ROLLOUT}.n=1", f"{ROLLOUT}.do_sample=False", f"{ROLLOUT}.temperature=0"],
        ["stage=seqkd", f"{ROLLOUT}.top_p=0.9", f"{ROLLOUT}.top_k=50", "critic.enable=False"],
        [f"{ROLLOUT}.val_kwargs.do_sample=True", f"{ROLLOUT}.val_kwargs.temperature=1", f"{ROLLOUT}.val_kwargs.n=4"],
        [f"{ACTOR}.kl_loss_type=k3+"],
        [f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.kl_loss_type=full"],
        ["trainer.val_only=True", "data.val_files=v.parquet"],
        ["trainer.logger=[console,file,jsonl,tensorboard,wandb,mlflow,swanlab,trackio]"],
        ["trainer.resume_mode=disable"],
        ["algorithm.rollout_is=token", "algorithm.rollout_is_threshold=1.5"],
        ["trainer.best_metric=val/x", "data.val_files=v.parquet", "trainer.test_freq=-1"],
        ["trainer.best_metric=val/sft_loss", "trainer.best_mode=min", "data.val_files=v.parquet"],
    ],
)
def test_no_conflict(overrides):
    assert isinstance(with_required(*overrides), Config)


def test_a_policy_loss_that_cannot_take_weights(monkeypatch):
    """It is taken without them: they are passed where there are any."""
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "own", lambda old, new, advantages, mask, mode, config, **totals: None)
    own = f"{ACTOR}.policy_loss.loss_mode=own"
    assert isinstance(with_required(own), Config)
    with pytest.raises(ConfigError, match="the policy loss own has no parameter rollout_is_weights"):
        with_required(own, "algorithm.rollout_is=token")


# ---- installed


def test_the_command_line_finds_its_yaml_from_another_folder(tmp_path):
    """The whole entry point, up to Hydra's own printing of the job's settings."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--cfg", "job", "stage=seqkd", "+trainer.nnodes=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    settings = OmegaConf.create(done.stdout)
    assert settings.trainer.critic_warmup == -1
    assert settings.trainer.nnodes == 4
    assert settings.actor_rollout_ref.rollout.n == 8
    assert os.listdir(tmp_path) == []


def test_a_run_leaves_no_log_file_in_the_working_folder(tmp_path):
    # Unlike `--cfg job`, a run goes through Hydra's set-up of logging; this one ends at the settings.
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "stage=seqkd", "trainer.nnodes=many"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "trainer.nnodes" in done.stderr
    assert os.listdir(tmp_path) == []


def test_every_yaml_is_package_data(tmp_path):
    code = (
        "import distutils.core as core, os\n"
        "build = core.run_setup('setup.py', stop_after='init').get_command_obj('build_py')\n"
        "build.ensure_finalized()\n"
        "print('\\n'.join(os.path.join(src, f) for _, src, _, files in build.data_files for f in files))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools\n" + code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    # setuptools gives the paths with the source folder in front of each.
    packed = {os.path.basename(line) + "@" + os.path.basename(os.path.dirname(line)) for line in done.stdout.split()}
    written = {f"{path.name}@{path.parent.name}" for path in CONFIG_DIR.rglob("*.yaml")}
    assert len(written) == 12
    assert written <= packed
