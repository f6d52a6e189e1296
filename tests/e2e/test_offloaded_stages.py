"""Whole stages whose models and optimizers rest in memory of the host between their uses, which on CPU they would not.

What asks for a tensor that has been put away fails there, as it would on a GPU.
"""

from __future__ import annotations

import pytest

from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.config import FSDPConfig
from verl.memory import offload
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors
from verl.workers import fsdp_workers, worker_base

pytestmark = pytest.mark.e2e
MODELS = ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic.model")
REFERENCE = "actor_rollout_ref.actor.use_kl_loss=True"
LORA = ("actor_rollout_ref.model.lora_rank=4", "critic.model.lora_rank=4")
WAYS = {
    "reference": (REFERENCE,),
    "written behind": (REFERENCE, "trainer.async_save=True"),
    "adapters apart": (REFERENCE, *LORA, "critic.model.share_base=False"),
    "adapters on one base": (REFERENCE, *LORA, "critic.model.share_base=True"),
}
WATCHED = ("critic/d_loss", "critic/grad_norm", "actor/grad_norm", "actor/kl_loss", "val/sft_loss")


@pytest.fixture
def offloading(monkeypatch):
    """Models rest in the host's memory although they are there anyway."""
    build = offload.build_offloader

    def as_on_a_gpu(module, optimizer, fsdp: FSDPConfig, device, base=None):
        return build(module, optimizer, fsdp, "cuda", base)

    for workers in (worker_base, fsdp_workers):
        monkeypatch.setattr(workers, "build_offloader", as_on_a_gpu)
    return [f"{part}.fsdp_config.{what}_offload=True" for part in MODELS for what in ("param", "optimizer")]


def weights(run, step, part):
    return read_full_tensors(run / f"global_step_{step}" / part / "model")


@pytest.mark.parametrize("way", WAYS)
def test_gad_is_the_same_to_the_bit_when_everything_rests_on_the_host(run, offloading, way):
    """Validation, checkpoints and resuming with it."""
    settings = (*WAYS[way], "trainer.val_before_train=True", "trainer.test_freq=2", "trainer.save_freq=2")
    plain = run(f"{way} plain", *settings, steps=4)
    first = run(f"{way} offloaded", *settings, *offloading, steps=2)
    second = run(f"{way} offloaded", *settings, *offloading, steps=4)
    assert first == second
    seen, expected = read_metrics(second), read_metrics(plain)
    for step, metrics in expected.items():
        for name in WATCHED:
            assert seen[step].get(name) == metrics.get(name), (step, name)
    assert {name for metrics in expected.values() for name in WATCHED if name in metrics} == set(WATCHED)
    for part in ("actor", "critic"):
        assert_equal_tensors(weights(second, 4, part), weights(plain, 4, part))


def test_seqkd_is_the_same_to_the_bit_when_everything_rests_on_the_host(folder, run, offloading):
    settings = ("stage=seqkd", "trainer.total_training_steps=3", "trainer.test_freq=1")
    plain = train(folder, "seqkd plain", *settings, run_with=run_in_process)
    resting = train(folder, "seqkd offloaded", *settings, *offloading[:2], run_with=run_in_process)
    assert_equal_tensors(weights(resting, 3, "actor"), weights(plain, 3, "actor"))
