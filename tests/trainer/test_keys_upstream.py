"""Keys that are none here: upstream verl's, shortened ones and typos, by meaning."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from verl.trainer.config import ConfigError, compose_config
from verl.trainer.config.loading import known_keys
from verl.trainer.config.upstream import families, sort_out, suggestion, table

ROOT = Path(__file__).parents[2]
KNOWN = known_keys()
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REQUIRED = ["data.train_files=t.parquet", "actor_rollout_ref.model.path=base", "trainer.experiment_name=x"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("actor.optim.lr", f"{ACTOR}.optim.lr"),
        ("actor.lr", f"{ACTOR}.optim.lr"),
        ("critic.lr", "critic.optim.lr"),
        ("lr", f"{ACTOR}.optim.lr or critic.optim.lr"),
        ("optim.lr", f"{ACTOR}.optim.lr or critic.optim.lr"),
        ("ppo_epochs", f"{ACTOR}.ppo_epochs or critic.ppo_epochs"),
        ("actor.ppo_epochs", f"{ACTOR}.ppo_epochs"),
        ("actor.use_kl_loss", f"{ACTOR}.use_kl_loss"),
        ("actor.kl_coef", f"{ACTOR}.kl_loss_coef"),
        ("use_sft_mode", f"{ACTOR}.use_sft_mode"),
        ("loss_mode", f"{ACTOR}.policy_loss.loss_mode"),
        ("rollout.n", f"{ROLLOUT}.n"),
        ("n", f"{ROLLOUT}.n"),
        ("temperature", f"{ROLLOUT}.temperature"),
        ("val_kwargs.temperature", f"{ROLLOUT}.val_kwargs.temperature"),
        ("rollout.temprature", f"{ROLLOUT}.temperature"),
        ("model.path", "actor_rollout_ref.model.path"),
        ("train_batch_size", "data.train_batch_size"),
        ("total_epochs", "trainer.total_epochs"),
        ("trainer.saveFreq", "trainer.save_freq"),
        ("trainer.save-freq", "trainer.save_freq"),
        ("trainer.val_files", "data.val_files"),
        ("critic.loss", "critic.discriminator.loss"),
    ],
)
def test_the_key_that_is_meant(typed, meant):
    assert suggestion(typed, KNOWN) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    "typed",
    # Another model's key, another meaning, or nothing like it: no word is better than a wrong one.
    ["critic.use_kl_loss", "critic.n", "rollout.lr", "ref.optim.lr", "data.lr", "trainer.n", "zzz.qqq", "rollout.foo",
     "actor.replay.capacity", "rollout.balance.highest", "trainer.val_dat", "data.prompt"],
)  # fmt: skip
def test_no_suggestion_is_better_than_a_wrong_one(typed):
    assert suggestion(typed, KNOWN) == ""


# The keys that a user of verl met refused with a suggestion that was wrong: value, and what is said (None: taken).
MET = [
    ("actor_rollout_ref.model.lora_adapter_path", "/adapter", "an adapter's folder is given as model.path"),
    ("actor_rollout_ref.model.lora.rank", 0, None),
    (f"{ROLLOUT}.calculate_log_probs", True, None),
    (f"{ROLLOUT}.enable_prefix_caching", True, None),
    (f"{ROLLOUT}.enable_prefix_caching", False, "always on"),
    (f"{ROLLOUT}.load_format", "safetensors", None),
    (f"{ROLLOUT}.layered_summon", True, None),
    (f"{ROLLOUT}.ignore_eos", False, None),
    (f"{ROLLOUT}.ignore_eos", True, "not there"),
    (f"{ROLLOUT}.engine_kwargs.vllm.swap_space", 4, "not there"),
    (f"{ROLLOUT}.mode", "async", None),
    (f"{ROLLOUT}.multi_turn.enable", True, "not there"),
    (f"{ROLLOUT}.multi_turn.max_turns", 3, None),
    (f"{ROLLOUT}.agent.num_workers", 8, None),
    ("algorithm.rollout_correction.rollout_is", None, None),
    ("algorithm.rollout_correction.rollout_is", "token", "named algorithm.rollout_is here"),
    ("algorithm.rollout_correction.rollout_rs", "token", "not there"),
    ("actor_rollout_ref.model.use_fused_kernels", True, None),
    ("actor_rollout_ref.model.use_liger", True, None),
    (f"{ACTOR}.checkpoint.save_contents", ["model", "hf_model"], None),
    (f"{ACTOR}.data_loader_seed", 42, None),
    (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", 1, None),
    (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", 2, "named actor_rollout_ref.actor.ulysses_"),
    (f"{ACTOR}.fsdp_config.offload_policy", False, None),
    (f"{ACTOR}.fsdp_config.offload_policy", True, "not there: see fsdp_config.param_offload"),
    (f"{ACTOR}.fsdp_config.model_dtype", "fp32", None),
    (f"{ACTOR}.fsdp_config.model_dtype", "bfloat16", "always on: master weights are in fp32"),
    (f"{ACTOR}.fsdp_config.forward_prefetch", True, None),
    (f"{ACTOR}.use_torch_compile", True, f"named {ACTOR}.fsdp_config.use_torch_compile here"),
    (f"{ACTOR}.ppo_micro_batch_size", 8, f"named {ACTOR}.ppo_micro_batch_size_per_gpu here"),
    ("actor_rollout_ref.ref.strategy", "fsdp", None),
    ("actor_rollout_ref.ref.strategy", "megatron", "always on"),
    ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu", 16384, None),
    ("actor_rollout_ref.ref.log_prob_use_dynamic_bsz", True, None),
    ("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu", 16, None),
    ("data.image_key", "images", None),
    ("data.reward_fn_key", "data_source", None),
    ("reward_model.reward_manager", "dapo", None),
    ("reward_model.path", "/critic", "named critic.model.path here"),
    ("trainer.use_legacy_worker_impl", "auto", None),
    ("trainer.esi_redundant_time", 0, None),
    ("trainer.del_local_ckpt_after_load", False, None),
    ("trainer.del_local_ckpt_after_load", True, "not there"),
    # False means that all are kept, which is not the default here.
    ("trainer.remove_previous_ckpt_in_save", False, "named trainer.max_actor_ckpt_to_keep here"),
    ("trainer.val_data", "x.parquet", "named data.val_files here"),
    ("ray_kwargs.ray_init.runtime_env.py_executable", "python3", None),
    ("rollout.load_format", "auto", None),  # shortened
    (f"{ROLLOUT}.repetition_penalty", 1.0, None),
    (f"{ROLLOUT}.repetition_penalty", True, "not there"),
    # Kept from a wide pattern: a bonus is no chunking, and a function that rewards is no setting without effect.
    (f"{ACTOR}.entropy_from_logits_with_chunking", True, None),
    ("actor_rollout_ref.ref.fsdp_config.entropy_checkpointing", False, None),
    (f"{ACTOR}.entropy_bonus", 0.01, "unknown key"),
    ("reward.custom_reward_function.path", "reward.py", "named custom_reward_function.path here"),
    (f"{ACTOR}.optim.optimizer", "AdamW", None),
    ("critic.optim.optimizer", "SGD", "always on: AdamW"),
    (f"{ACTOR}.optim.clip_grad", 0.5, f"named {ACTOR}.grad_clip here"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "said"), MET)
def test_keys_of_upstream(key, value, said):
    refused, idle = sort_out({key: value}, KNOWN)
    assert len(refused) == (said is not None)
    if said is None:
        assert key not in idle or idle[key].startswith(("no effect here: ", "always on: "))
    else:
        assert said in refused[0] and key in refused[0] and "did you mean" not in refused[0]


def test_the_list_says_one_of_four_things():
    for family in families():
        assert re.match(r"(not there|always on|no effect here)(: .+)?$|named .+ here", family.says), family.says
        assert family.taken is not None or family.says.startswith(("no effect here", "always on")), family


def test_a_key_of_ours_is_never_taken_for_one_of_the_list():
    """Shortened, or mistyped where the list has a pattern: it would be dropped with a word in the log."""
    short = {key.removeprefix("actor_rollout_ref."): 1 for key in KNOWN if key.startswith("actor_rollout_ref.")}
    refused, idle = sort_out(short, KNOWN)
    assert (len(refused), idle) == (len(short), {})
    assert sort_out({"reward_model.enabel": True}, KNOWN)[0] == [
        "unknown key reward_model.enabel; did you mean reward_model.enable?"
    ]


def test_names_in_the_list_are_keys_here():
    for family in families():
        named = re.match(r"named ([\w.]+)", family.says)
        assert named is None or named[1] in KNOWN, family.says


def test_what_has_no_effect_is_said_and_what_is_refused_is_listed(caplog):
    with caplog.at_level(logging.INFO):
        compose_config([*REQUIRED, f"{ROLLOUT}.mode=async", "trainer.use_legacy_worker_impl=auto"])
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{ROLLOUT}.mode: no effect here: " in said and "trainer.use_legacy_worker_impl: no effect here: " in said
    with pytest.raises(ConfigError) as caught:
        compose_config(
            [*REQUIRED, "actor_rollout_ref.model.lora_adapter_path=/x", "actor.optim.lr=1e-6", "trainer.nnodes=no"]
        )
    assert len(caught.value.problems) == 3


def test_a_free_dictionary_may_have_a_key_of_the_list():
    config = compose_config([*REQUIRED, "+actor_rollout_ref.model.override_config={attn_implementation: sdpa, a: 1}"])
    assert config.actor_rollout_ref.model.override_config == {"a": 1}


def test_the_documented_table_is_the_list():
    page = (ROOT / "docs" / "settings_from_verl.md").read_text(encoding="utf-8")
    assert table() in page
