"""GAD on real Ray whose ranks share the tokens of their rows: the numbers of a run whose ranks do not."""

import shutil

import pytest

from tests.e2e.running import read_metrics, train

pytestmark = pytest.mark.distributed

ACTOR, CRITIC = "actor_rollout_ref.actor.ulysses_sequence_parallel_size", "critic.ulysses_sequence_parallel_size"
# What a machine does, and how rows are spread over ranks.
OTHER = ("timing", "perf/", "global_seqlen/")


@pytest.fixture(scope="module")
def stage(folder):
    def run(name, critic, warmup, steps, *overrides):
        return train(
            folder, name, "stage=warmup", f"trainer.critic_warmup={warmup}", f"critic.model.path={critic}",
            "trainer.n_gpus_per_node=2", "trainer.save_freq=1", f"trainer.total_training_steps={steps}",
            "critic.optim.lr=1e-3", "trainer.test_freq=-1", "trainer.val_before_train=False",
            "algorithm.use_kl_in_reward=True", "actor_rollout_ref.rollout.sync_check_prompts=4", *overrides,
        )  # fmt: skip

    return run


def test_a_run_and_one_that_goes_on_with_other_groups(folder, stage):
    """Every rank writes answers to its own prompts, whoever computes with them afterwards. A step is compared with one
    from the same weights: AdamW's first steps make as much of a gradient's rounding as of a gradient."""
    critic = stage("warmup", f"{folder}/base", 1, 1) / "global_step_1/critic"
    alone = read_metrics(stage("alone", critic, 0, 2))
    together = read_metrics(stage("together", critic, 0, 1, f"{ACTOR}=2", f"{CRITIC}=2"))
    same(together[0], alone[0])

    begun = folder / "runs/goes_on/global_step_1"
    shutil.copytree(folder / "runs/alone/global_step_1", begun)
    resume = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={begun}")
    resumed = read_metrics(stage("goes_on", critic, 0, 2, f"{ACTOR}=2", *resume))
    assert sorted(resumed) == [1]
    same(resumed[1], alone[1])


def same(metrics, expected):
    assert metrics.keys() == expected.keys()
    assert (
        "actor/kl_loss" in expected and "critic/d_loss" in expected and "training/rollout_probs_diff_mean" in expected
    )
    for name, value in expected.items():
        if not name.startswith(OTHER):
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
