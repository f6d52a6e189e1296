"""A run of two ranks on Ray is killed right after a save and started again: nothing in its files tells it from one that
was left alone, times apart. Every stage, with everything that has a state switched on."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.running import assert_equal_tensors
from tests.faults.runs import arguments, trainer
from tests.tiny import write_data, write_model
from verl.trainer.config import compose_config
from verl.trainer.main_ppo import run_ppo
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

STEPS = 6
# 18 rows in batches of 4: the fifth step goes on into the second epoch.
COMMON = (
    "trainer.n_gpus_per_node=2", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", "trainer.test_freq=2",
    "trainer.val_before_train=True", "actor_rollout_ref.actor.optim.lr=1e-3", "data.shuffle=True",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine", "actor_rollout_ref.actor.optim.lr_warmup_steps=2",
    "trainer.max_actor_ckpt_to_keep=null", "trainer.best_metric=val/sft_loss", "trainer.best_mode=min",
)  # fmt: skip
CRITIC = (
    "critic.optim.lr=1e-3", "critic.optim.lr_scheduler_type=cosine", "critic.optim.lr_warmup_steps=2",
    "critic.replay.capacity=24", "critic.held_out_prompts=5", "critic.balance.enable=True",
)  # fmt: skip
# Two ranks train and a third writes.
AHEAD = ("trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1", "ray_kwargs.ray_init.num_cpus=3",
         "algorithm.rollout_is=token")  # fmt: skip
# By stage: its settings, the step after whose save the run is killed, and whether that is written in the background.
STAGES = {
    "seqkd": (("stage=seqkd", "trainer.sft_monitor_freq=2"), 4, True),
    "warmup": (("stage=warmup", "trainer.critic_warmup=3", *CRITIC), 2, False),
    "warmup by SFT": (("stage=warmup", "trainer.warmup_use_sft=True", "trainer.critic_warmup=10", *CRITIC), 4, False),
    "gad": (
        (
            "stage=gad", "trainer.critic_warmup=auto", "critic.head_start.check_every=1",
            "critic.head_start.accuracy=0.05", "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.horizon=100", "actor_rollout_ref.actor.sft_anchor_coef=0.5",
            "actor_rollout_ref.actor.sft_anchor_end_coef=0.1", *CRITIC,
        ),
        4,
        True,
    ),
    "ahead": (("stage=warmup", "trainer.critic_warmup=1", *AHEAD, *CRITIC), 4, True),
    "soda": (("stage=soda", "actor_rollout_ref.rollout.n=1", "soda.resample=epoch"), 4, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("bitwise")
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=6)
    return path


def lines(run):
    """The lines of metrics.jsonl, times and what follows from them apart."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_time = ("timing", "perf/")
    return [(line["step"], {k: v for k, v in line["data"].items() if not k.startswith(of_time)}) for line in found]


def assert_equal_checkpoints(actual, expected):
    """Every tensor to its last byte, and all other files but those that tell one file from another."""
    files = [
        sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file()) for one in (actual, expected)
    ]
    assert files[0] == files[1]
    parts = sorted(folder for folder in expected.rglob("*") if folder.name in ("model", "optim"))
    for folder in parts:
        assert_equal_tensors(read_full_tensors(actual / folder.relative_to(expected)), read_full_tensors(folder))
    for name in files[1]:
        one, other = actual / name, expected / name
        # Safetensors puts tensors into a file in another order from run to run.
        if one.suffix == ".safetensors":
            tensors = load_file(one), load_file(other)
            assert tensors[0].keys() == tensors[1].keys()
            assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
        elif one.name != "checksums.json":
            assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_after_a_save_is_the_run_that_was_not(models, tmp_path, stage):
    settings, killed_after, background = STAGES[stage]
    settings = (*settings, *COMMON, f"data.val_files={models}/val.jsonl")
    if any(name.startswith("critic.") for name in settings):
        settings += (f"critic.model.path={models}/base",)
    whole, parts = tmp_path / "a" / "run", tmp_path / "b" / "run"
    parts.parent.mkdir()
    run_ppo(compose_config(arguments(models, whole, *settings)))

    run = trainer(models, parts, *settings, f"trainer.async_save={background}")
    try:
        run.wait_until((parts / f"global_step_{killed_after}").is_dir, f"the save after step {killed_after}")
        os.killpg(run.process.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        assert not (parts / f"global_step_{STEPS}").exists()
    finally:
        run.stop()
    run = trainer(models, parts, *settings, f"trainer.async_save={background}")
    try:
        assert run.end() == 0, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    assert "steps are done" in run.log.read_text()

    once, again = dict(lines(whole)), dict(lines(parts))
    assert len(once) == STEPS + 1
    assert again == once
    assert_equal_checkpoints(parts / f"global_step_{STEPS}", whole / f"global_step_{STEPS}")
    assert (parts / "best").resolve().name == (whole / "best").resolve().name
