"""A warmup on real Ray whose ranks share the tokens of their rows: the numbers of one whose ranks do not."""

import shutil

import pytest

from tests.e2e.running import read_metrics, train

pytestmark = pytest.mark.distributed

ACTOR, CRITIC = "actor_rollout_ref.actor.ulysses_sequence_parallel_size", "critic.ulysses_sequence_parallel_size"
# What a machine does, and how rows are spread over ranks.
OTHER = ("timing", "perf/", "global_seqlen/")


@pytest.fixture(scope="module")
def stage(folder):
    def run(name, *overrides, steps=2):
        return train(
            folder, name, "stage=warmup", "trainer.critic_warmup=0", "trainer.n_gpus_per_node=2",
            f"critic.model.path={folder}/base", "critic.optim.lr=1e-3", "trainer.test_freq=-1",
            "trainer.val_before_train=False", "trainer.save_freq=1", f"trainer.total_training_steps={steps}",
            "algorithm.use_kl_in_reward=True", "actor_rollout_ref.rollout.sync_check_prompts=4", *overrides,
        )  # fmt: skip

    return run


def test_a_run_and_one_that_goes_on_with_other_groups(folder, stage):
    """Every rank writes answers of its own prompts, whoever computes them afterwards."""
    alone = read_metrics(stage("alone"))
    together = read_metrics(stage("together", f"{ACTOR}=2", f"{CRITIC}=2"))
    assert sorted(together) == sorted(alone) == [0, 1]
    for step, metrics in alone.items():
        assert together[step].keys() == metrics.keys()
        for name in (name for name in metrics if not name.startswith(OTHER)):
            assert together[step][name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), (step, name)

    shutil.copytree(folder / "runs/alone/global_step_1", folder / "runs/goes_on/global_step_1")
    resumed = read_metrics(
        stage(
            "goes_on",
            f"{ACTOR}=2",
            "trainer.resume_mode=resume_path",
            f"trainer.resume_from_path={folder}/runs/goes_on/global_step_1",
        )  # fmt: skip
    )
    assert sorted(resumed) == [1]
    for name in (name for name in alone[1] if not name.startswith(OTHER)):
        assert resumed[1][name] == pytest.approx(alone[1][name], rel=1e-3, abs=1e-5), name
