"""Work that a run leaves out changes nothing: each against the same run with the work put back."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.running import read_metrics
from verl.trainer.config import Config
from verl.trainer.ppo import steps
from verl.utils.checkpoint.sharded import read_full_tensors
from verl.workers.actor.dp_actor import DataParallelPPOActor

pytestmark = pytest.mark.e2e
STEPS = 3


@pytest.fixture
def calls(monkeypatch):
    """How often the policy's, or the reference's, log-probs of a batch were computed in a pass of their own, by the
    number of prompts."""
    seen = []
    original = DataParallelPPOActor.compute_log_prob

    def counted(self, data, entropy=True):
        seen.append(("reference" if self.actor_optimizer is None else "policy", len(data)))
        return original(self, data, entropy)

    monkeypatch.setattr(DataParallelPPOActor, "compute_log_prob", counted)
    return seen


def assert_same_run(one, other):
    """The same weights at the end, and the same metrics at every step, times and memory aside."""
    ours, theirs = (read_full_tensors(run / f"global_step_{STEPS}" / "actor" / "model") for run in (one, other))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    ours, theirs = read_metrics(one), read_metrics(other)
    for step, metrics in ours.items():
        shared = {name for name in metrics.keys() & theirs[step].keys() if not name.startswith(("timing", "perf"))}
        assert {"response_length/mean", "actor/grad_norm"} <= shared or step != STEPS - 1
        for name in shared:
            assert metrics[name] == pytest.approx(theirs[step][name], rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.parametrize("loss", ["gspo", "vanilla"])
def test_the_old_log_prob_pass(run, calls, monkeypatch, loss):
    """Its values are those of the update's own forward; the sync check alone looks at its two prompts. While the actor
    is frozen nobody needs any, the reference's neither."""
    overrides = (f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}", "actor_rollout_ref.actor.optim.lr=1e-2")
    without = run(f"{loss} without", *overrides)
    assert calls == [("policy", 2), ("policy", 2), ("reference", 4), ("policy", 2), ("reference", 4)]
    calls.clear()
    monkeypatch.setattr(Config, "needs_old_log_probs", True)
    assert_same_run(without, run(f"{loss} with", *overrides))
    assert calls == [("policy", 2), ("policy", 4), ("reference", 4), ("policy", 4), ("reference", 4)]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_against_an_engine_that_computes_the_same(run, level):
    """They are 1, and change nothing."""
    plain, weighted = read_metrics(run("plain")), read_metrics(run(level, f"algorithm.rollout_is={level}"))
    assert "rollout_corr/rollout_is_mean" not in weighted[0]  # The actor is frozen.
    for step in range(1, STEPS):
        for name in ("mean", "min", "max", "eff_sample_size"):
            assert weighted[step][f"rollout_corr/rollout_is_{name}"] == pytest.approx(1, abs=1e-3), name
        for name in ("actor/grad_norm", "actor/kl_loss", "actor/pg_loss", "response_length/mean"):
            assert weighted[step][name] == pytest.approx(plain[step][name], rel=1e-3, abs=1e-6), (step, name)


def test_weights_multiply_the_policy_loss_and_the_engine_reports_all_answers_only_then(run, calls, monkeypatch):
    """Twice the weights are twice the loss; frozen, the actor needs no more log-probs than the sync check."""
    others = "actor_rollout_ref.actor.use_kl_loss=False", "actor_rollout_ref.actor.sft_anchor_coef=0"
    asked = "algorithm.rollout_is=token", *others
    once = read_metrics(run("weights of 1", *asked, steps=2))
    assert calls == [("policy", 2), ("policy", 4)]
    original = steps.truncated_importance_weights

    def doubled(*args):
        weights, metrics = original(*args)
        return 2 * weights, metrics

    monkeypatch.setattr(steps, "truncated_importance_weights", doubled)
    twice = read_metrics(run("weights of 2", *asked, steps=2))
    assert once[1]["actor/pg_loss"] != 0
    for name in ("actor/pg_loss", "actor/grad_norm"):
        assert twice[1][name] == pytest.approx(2 * once[1][name], rel=1e-4), name


def test_two_mini_batches_need_the_old_log_probs(run, calls):
    run("two mini-batches", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "critic.ppo_mini_batch_size=4")
    assert ("policy", 4) in calls


def test_kl_in_the_reward_needs_them_even_while_the_actor_is_frozen(run, calls):
    """The update does not: its ratios are 1 to the last bit."""
    metrics = read_metrics(run("kl in reward", "algorithm.use_kl_in_reward=True", steps=2))
    assert calls == [("policy", 4), ("reference", 4)] * 2
    assert metrics[1]["actor/ppo_kl"] == 0


def test_the_reference_of_a_run_without_kl(run, calls):
    """With a coefficient of 0 it is kept and computed, and counts for nothing."""
    without = run("no reference", "actor_rollout_ref.actor.use_kl_loss=False")
    assert "reference" not in {who for who, _ in calls}
    zero = run("reference for nothing", "actor_rollout_ref.actor.kl_loss_coef=0")
    assert "reference" in {who for who, _ in calls}
    assert_same_run(without, zero)


def test_the_students_answers_in_seqkd(run):
    seqkd = ("stage=seqkd", "trainer.critic_warmup=-1")
    silent = run("silent", *seqkd, "trainer.sft_monitor_freq=-1")
    assert not any("timing_s/gen" in metrics for metrics in read_metrics(silent).values())
    watched = run("watched", *seqkd, "trainer.sft_monitor_freq=1")
    assert all("timing_s/gen" in metrics for metrics in read_metrics(watched).values())
    ours, theirs = (read_full_tensors(r / f"global_step_{STEPS}" / "actor" / "model") for r in (silent, watched))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
