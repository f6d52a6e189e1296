"""A GAD run that was begun by two ranks goes on with one, and with four: on real Ray, with all that it keeps."""

from __future__ import annotations

import shutil

import pytest

from tests.e2e.running import read_metrics
from tests.faults.runs import trainer
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

# Replay, stored held-out answers and the KL controller are the run's own state beside the models.
SETTINGS = (
    "stage=warmup",
    "trainer.critic_warmup=1",
    "critic.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    "actor_rollout_ref.actor.optim.total_training_steps=10",
    "critic.replay.capacity=24",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.type=adaptive",
    "ray_kwargs.ray_init.num_cpus=4",
    "trainer.save_freq=2",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
)


def test_a_run_goes_on_with_another_number_of_ranks(folder, tmp_path):
    def go(name, ranks, steps):
        run = trainer(
            folder, tmp_path / name, *SETTINGS, f"critic.model.path={folder}/base",
            f"trainer.n_gpus_per_node={ranks}", f"trainer.total_training_steps={steps}",
        )  # fmt: skip
        try:
            assert run.end() == 0, run.log.read_text()
        finally:
            run.stop()
        return run.log.read_text()

    assert "was written by" not in go("by_2", 2, 2)
    resumed = {}
    for ranks in (1, 4):
        name = f"on_{ranks}"
        shutil.copytree(tmp_path / "by_2", tmp_path / name)
        said = go(name, ranks, 4)
        assert f"was written by 2 ranks, and this run has {ranks}" in " ".join(said.split())
        assert find_latest_ckpt_path(tmp_path / name).endswith("global_step_4")
        metrics = read_metrics(tmp_path / name)
        assert sorted(metrics) == [0, 1, 2, 3]
        resumed[ranks] = metrics[2]
        assert metrics[2]["critic/replay/fraction"] == 0.5, "a buffer that starts empty would replay nothing yet"
    for name in ("actor/lr", "critic/lr", "training/epoch", "critic/teacher_score_mean"):
        assert resumed[1][name] == pytest.approx(resumed[4][name], rel=1e-5), name
