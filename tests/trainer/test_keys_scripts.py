"""Command lines as people have them: plain GRPO and GSPO examples of verl, and scripts that name no stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.trainer.config import ConfigError, compose_config

ROOT = Path(__file__).parents[2]
ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
DATA = ["data.train_files=train.parquet", "data.val_files=test.parquet", f"{MODEL}.path=/m"]

# What such a script sets, in this project's own numbers: the keys of reference scripts.
PLAIN = [
    *DATA, "algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=False", "data.train_batch_size=512",
    "data.max_prompt_length=512", "data.max_response_length=1024", "data.filter_overlong_prompts=True",
    "data.truncation='error'", f"{MODEL}.use_remove_padding=True", f"{MODEL}.enable_gradient_checkpointing=True",
    f"{ACTOR}.optim.lr=1e-6", f"{ACTOR}.ppo_mini_batch_size=128", f"{ACTOR}.ppo_micro_batch_size_per_gpu=16",
    f"{ACTOR}.entropy_coeff=0", f"{ACTOR}.fsdp_config.param_offload=False",
    f"{ACTOR}.fsdp_config.optimizer_offload=False",
    f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.gpu_memory_utilization=0.6",
    f"{ROLLOUT}.n=5", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=32", f"{ROLLOUT}.enable_chunked_prefill=False",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True", "trainer.logger=['console','wandb']",
    "trainer.project_name=examples", "trainer.experiment_name=grpo", "trainer.n_gpus_per_node=8", "trainer.nnodes=1",
    "trainer.save_freq=20", "trainer.test_freq=5", "trainer.total_epochs=15", "trainer.device=cuda",
    "critic.model.path=/critic",
]  # fmt: skip
GRPO = [
    *PLAIN, "trainer.critic_warmup=0", f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.001",
    f"{ACTOR}.kl_loss_type=low_var_kl", "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
    "trainer.use_legacy_worker_impl=enable", f"{ROLLOUT}.mode=async", "reward_model.reward_manager=naive",
]  # fmt: skip
GSPO = [
    *PLAIN, f"{ACTOR}.policy_loss.loss_mode=gspo", f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.kl_loss_coef=0.0",
    f"{ACTOR}.clip_ratio_low=3e-4", f"{ACTOR}.clip_ratio_high=4e-4", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean",
    f"{ACTOR}.strategy=fsdp", "algorithm.kl_ctrl.kl_coef=0.0", f"{ACTOR}.use_dynamic_bsz=True",
    f"{ACTOR}.ppo_max_token_len_per_gpu=8192", "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8192", f"{ROLLOUT}.log_prob_use_dynamic_bsz=True",
    "ray_kwargs.ray_init.runtime_env.py_executable='python3'", f"{ROLLOUT}.val_kwargs.top_p=0.7",
    f"{ROLLOUT}.val_kwargs.do_sample=True", f"{ROLLOUT}.val_kwargs.temperature=1.0", "data.return_raw_chat=True",
    f"{MODEL}.use_fused_kernels=True", f"{ROLLOUT}.calculate_log_probs=True",
]  # fmt: skip


@pytest.mark.parametrize("script", [GRPO, GSPO], ids=["grpo", "gspo"])
def test_a_plain_script_of_verl_composes(script):
    config = compose_config(script)
    assert (config.stage, config.actor_rollout_ref.rollout.n, config.trainer.total_epochs) == ("GAD", 5, 15)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "gspo"


# ---- no stage named

SFT = [*DATA, f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.kl_loss_coef=0", f"{ACTOR}.optim.lr=5e-6"]


@pytest.mark.parametrize(
    "overrides",
    [
        [*SFT, "trainer.experiment_name=x"],
        [*SFT, "trainer.experiment_name=x", "trainer.critic_warmup=10"],
        [*SFT, "trainer.experiment_name=x", "trainer.critic_warmup=10", "critic.optim.lr=1e-6", "critic.grad_clip=0.2"],
        [*DATA, "trainer.experiment_name=qwen-SeqKD", "trainer.critic_warmup=10"],
        [*DATA, "trainer.experiment_name=x", f"{ACTOR}.use_kl_loss=False", "trainer.critic_warmup=10"],
    ],
)
def test_what_looks_like_sft_starts_no_discriminator(overrides):
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    (problem,) = caught.value.problems
    assert problem.startswith("no stage= is given, and the settings look like SFT (")
    assert "stage=seqkd" in problem and "stage=gad" in problem
    assert compose_config([*overrides, "stage=gad"]).use_critic


@pytest.mark.parametrize("sign", [f"{ACTOR}.use_sft_mode=True", "trainer.critic_warmup=-1", "critic.enable=False"])
def test_sft_by_name_starts_no_discriminator(sign):
    with pytest.raises(ConfigError):
        compose_config([*DATA, "trainer.experiment_name=x", sign])


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["critic.model.path=/c"], "GAD"),
        (["critic.model.path=/c", f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.kl_loss_coef=0"], "GAD"),
        (["critic.model.path=/c", "trainer.experiment_name=gad-from-seqkd"], "GAD"),
        (["trainer.critic_warmup=10"], "warmup"),
        (["trainer.critic_warmup=10", "critic.optim.lr=5e-6", "trainer.experiment_name=softmax"], "warmup"),
        (["trainer.warmup_use_sft=True", "trainer.critic_warmup=10", f"{ACTOR}.use_kl_loss=False"], "warmup"),
    ],
)
def test_a_plain_gad_command_needs_no_stage(overrides, stage):
    assert compose_config([*DATA, "trainer.experiment_name=x", *overrides]).stage == stage


# ---- stage scripts


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, timeout=400,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "N_GPUS_PER_NODE": "1"},
    )  # fmt: skip


def test_cfg_behind_a_stage_script_checks_the_settings(tmp_path):
    done = command(
        "bash", str(ROOT / "scripts/train/gpt5-8b-gad-gspo.sh"), "--model", "/m", "--reward_model", "/r", "--exp_name",
        "x", "--cfg", "job", "trainer.nnode=2", "actor.optim.lr=1e-6", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "experiment_name: x" in done.stdout and "TensorBoard" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if "loading libraries" not in line]
    assert errors == [
        "error: unknown key trainer.nnode; did you mean trainer.nnodes?",
        "error: unknown key actor.optim.lr; did you mean actor_rollout_ref.actor.optim.lr?",
    ]
    assert os.listdir(tmp_path) == []


def test_a_script_says_what_to_do_without_the_environment(tmp_path):
    script = str(ROOT / "scripts/train/gpt5-8b-gad-gspo.sh")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/bash\nexit 1\n")
    bare.chmod(0o755)
    arguments = [script, "--model", "/m", "--reward_model", "/r", "--exp_name", "x"]
    for python, said in ((str(bare), "activate the environment"), ("/no/python", "no such Python: /no/python")):
        done = subprocess.run(
            ["bash", *arguments], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHON": python}
        )
        assert done.returncode == 1 and said in done.stderr and "set PYTHON" in done.stderr
        assert "TensorBoard" not in done.stdout + done.stderr
    done = subprocess.run(["bash", script, "--resume_step", "5"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "trainer.resume_from_path" in done.stderr
