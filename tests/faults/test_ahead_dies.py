"""The process of an engine of its own is killed: the run ends with its name, and goes on from its last checkpoint."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.running import read_metrics
from tests.faults.runs import lines_of, trainer
from tests.tiny import write_data, write_model
from verl.utils.checkpoint.checkpoint_manager import tracked_step

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

STEPS = 400


@pytest.mark.timeout(1800)
def test_a_killed_engine_ends_the_run_by_name_and_the_same_command_goes_on(tmp_path):
    write_model(tmp_path / "base")
    write_data(tmp_path / "train.jsonl", rows=18)
    settings = (
        "stage=warmup", "trainer.critic_warmup=1", f"critic.model.path={tmp_path}/base", "trainer.save_freq=2",
        "trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1", "algorithm.rollout_is=token",
        "trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_cpus=3",
        "trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2",
        "trainer.total_epochs=1000",
    )  # fmt: skip
    folder = tmp_path / "run"
    run = trainer(tmp_path, folder, *settings, f"trainer.total_training_steps={STEPS}")
    try:
        run.wait_until(lambda: lines_of(folder / "metrics.jsonl") > 4, "four steps")
        ranks = [process for process in run.processes() if process.name().startswith("ray::")]
        # Two ranks train, and the engine is alone.
        [engine] = [process for process in ranks if process.environ().get("WORLD_SIZE") == "1"]
        engine.kill()
        assert run.end() not in (0, -signal.SIGKILL)
        assert run.left_behind(20) == []
    finally:
        run.stop()
    said = run.log.read_text()
    assert "rollout rank 0 of 1 died in " in said
    begun = tracked_step(folder)
    assert begun >= 2
    made = max(read_metrics(folder))
    again = trainer(tmp_path, folder, *settings, f"trainer.total_training_steps={begun + 3}")
    try:
        assert again.end() == 0, again.log.read_text()
    finally:
        again.stop()
    assert f"{begun} steps are done" in again.log.read_text()
    metrics = read_metrics(folder)
    assert max(metrics) == max(made, begun + 2)
    assert metrics[begun]["training/rollout_staleness"] == 1, "the checkpoint had its answers"
    assert os.path.isdir(folder / f"global_step_{begun + 3}")
