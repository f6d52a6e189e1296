"""Failures of adversarial training that take a student too, each brought about on purpose, and the metric that moves.

`tests/workers/test_discriminator_failures.py` has those of the discriminator alone.
"""

from __future__ import annotations

import pytest

from tests.e2e.running import read_metrics

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
FAST = f"{ACTOR}.optim.lr=3e-3"
# Nothing but the reward moves the student.
REWARD_ALONE = (f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.sft_anchor_coef=0")


def mean(metrics, name, steps):
    return sum(metrics[step][name] for step in steps) / len(steps)


def test_answers_that_are_all_alike_teach_nothing(run):
    """A temperature near 0: n equal answers, equal scores to the last bit, advantages 0, and no policy gradient."""
    alike = read_metrics(run("alike", "actor_rollout_ref.rollout.temperature=1e-4", *REWARD_ALONE))
    for step in (0, 1, 2):
        assert alike[step]["critic/zero_std_group_frac"] == 1.0
        assert alike[step]["critic/advantages/max"] == alike[step]["critic/advantages/min"] == 0.0
    for step in (1, 2):
        assert alike[step]["actor/pg_loss"] == alike[step]["actor/grad_norm"] == 0.0
    varied = read_metrics(run("varied", *REWARD_ALONE))
    assert varied[1]["critic/zero_std_group_frac"] < 0.2
    assert varied[1]["actor/grad_norm"] > 0


def test_a_discriminator_that_does_not_learn_is_outrun(run):
    """Frozen, it is soon fooled: the student scores above the teacher, and d_acc falls far below one half."""
    metrics = read_metrics(run("outrun", "critic.optim.lr=0", FAST, *REWARD_ALONE, steps=60))
    assert mean(metrics, "critic/d_acc", range(50, 60)) < 0.3 < mean(metrics, "critic/d_acc", range(10))
    assert mean(metrics, "critic/score_diff", range(50, 60)) < mean(metrics, "critic/score_diff", range(10)) - 0.3


def test_a_clip_range_that_is_too_small_clips_nearly_everything(run):
    reused = (f"{ACTOR}.ppo_epochs=4", f"{ACTOR}.optim.lr=1e-3")
    small = read_metrics(run("clip_small", *reused, f"{ACTOR}.clip_ratio_low=1e-6", f"{ACTOR}.clip_ratio_high=1e-6"))
    wide = read_metrics(run("clip_wide", *reused, f"{ACTOR}.clip_ratio_low=0.5", f"{ACTOR}.clip_ratio_high=0.5"))
    # A step towards the advantage leaves the range on the side that is clipped; the first epoch has ratio 1.
    assert small[1]["actor/pg_clipfrac"] > 0.5
    assert wide[1]["actor/pg_clipfrac"] < small[1]["actor/pg_clipfrac"] - 0.15


@pytest.mark.parametrize(("sign", "name"), [(1, "long"), (-1, "short")])
def test_a_reward_on_length_runs_to_a_limit(run, folder, sign, name):
    """A reward of the answer's bytes, with either sign: to the maximum with clip_ratio 1, or collapsed."""
    (folder / f"{name}.py").write_text(
        f"def compute_score(prompt, answer, teacher):\n    return {sign} * len(answer)\n"
    )
    metrics = read_metrics(
        run(
            name,
            f"custom_reward_function.path={folder}/{name}.py",
            "algorithm.task_reward_weight=100",
            f"{ACTOR}.optim.lr=1e-2",
            *REWARD_ALONE,
            "actor_rollout_ref.rollout.temperature=1.0",
            # One in 26 ends by itself at first. With few answers a student may learn, by how its processor rounds, to
            # write bytes that are no text before it has seen an end, and keeps to that.
            "actor_rollout_ref.rollout.n=12",
            "data.max_response_length=10",
            steps=40,
        )
    )
    late = range(35, 40)
    if sign > 0:
        assert mean(metrics, "response_length/clip_ratio", late) > 0.95
    else:
        assert mean(metrics, "response_length/mean", late) < 0.5 * metrics[0]["response_length/mean"]


def test_a_student_that_never_ends_fills_the_width(run):
    """The untrained base knows no EOS: clip_ratio is far above 0.8."""
    metrics = read_metrics(run("endless", steps=1))
    assert metrics[0]["response_length/clip_ratio"] > 0.8
