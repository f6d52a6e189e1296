"""GAD through main_ppo and Ray on two ranks, every rank with its own vLLM engine."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from tests.e2e.running import read_metrics, train
from tests.tiny import write_data
from tests.vllm.forgetful_worker import ForgetfulRunner
from tests.vllm.tiny_engine import write_tiny_models
from verl.trainer.main_ppo import run_ppo

pytestmark = [pytest.mark.vllm, pytest.mark.e2e, pytest.mark.distributed]

ROLLOUT = "actor_rollout_ref.rollout"
GAP = "training/rollout_probs_diff_mean"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm")
    write_tiny_models(path)
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    return path


def gad(folder, name, steps, *overrides, run_with=run_ppo):
    """Metrics by step; weights move far in every update."""
    run = train(
        folder,
        name,
        "stage=gad",
        f"critic.model.path={folder}/critic",
        f"{ROLLOUT}.name=vllm",
        f"{ROLLOUT}.enforce_eager=True",
        f"{ROLLOUT}.gpu_memory_utilization=0.2",
        "actor_rollout_ref.actor.optim.lr=0.05",
        "actor_rollout_ref.actor.grad_clip=100",
        "trainer.n_gpus_per_node=2",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        *overrides,
        run_with=run_with,
    )
    return read_metrics(run)


def test_the_engine_runs_on_the_trainers_weights_at_every_step(folder):
    metrics = gad(folder, "synced", 2)
    assert sorted(metrics) == [0, 1]
    assert metrics[0]["actor/grad_norm"] > 0
    assert max(data[GAP] for data in metrics.values()) < 1e-4


def test_engines_of_their_own_write_a_step_ahead(folder):
    """Right after each push they have the weights that are trained next; what they have written is one update older."""
    own = ("trainer.n_gpus_per_node=1", "trainer.rollout_ahead=1", f"{ROLLOUT}.n_gpus_per_node=1")
    metrics = gad(folder, "ahead", 3, *own, "algorithm.rollout_is=token")
    assert [metrics[step]["training/rollout_staleness"] for step in range(3)] == [0, 1, 1]
    assert max(metrics[step][GAP] for step in range(2)) < 1e-4
    first, last = (metrics[step]["rollout_corr/rollout_is_std"] for step in (0, 2))
    assert first < 1e-2 < last, "weights move far in every update"


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="vLLM's CPU build has fp8 with AVX-512 only"
)
def test_keys_and_values_in_fp8_show_as_a_gap_that_weights_correct(folder):
    """Three bits of a mantissa: a sixteenth of each number at most, and of a probability not much more."""
    fp8 = ("trainer.n_gpus_per_node=1", f"{ROLLOUT}.kv_cache_dtype=fp8", "algorithm.rollout_is=token")
    metrics = gad(folder, "fp8", 2, *fp8)
    assert all(1e-4 < data[GAP] < 0.06 for data in metrics.values())
    assert all(data["rollout_corr/rollout_is_std"] > 1e-3 for data in metrics.values())


def test_a_push_that_is_left_out_raises_the_alarm(folder, caplog):
    """The engine keeps its memory, so that it can answer from old weights at all."""
    caplog.set_level(logging.WARNING)
    forgetful = partial(run_ppo, task_runner_class=ForgetfulRunner)
    tolerance = f"{ROLLOUT}.sync_check_tolerance=0.02"
    metrics = gad(folder, "forgotten", 2, f"{ROLLOUT}.free_cache_engine=False", tolerance, run_with=forgetful)
    assert metrics[0][GAP] < 1e-4
    assert metrics[1][GAP] > 0.02
    alarms = [record.message for record in caplog.records if "the engine's token probabilities" in record.message]
    assert len(alarms) == 1 and alarms[0].startswith("step 1:")
