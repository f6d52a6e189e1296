"""The driver's handle on the discriminator, with a real worker in this process."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.tiny import write_model
from tests.workers.updates_setup import ANSWERS, PROMPTS, batch
from verl.batch import PROMPT_KEYS, STUDENT_KEYS, TEACHER_KEYS, Answers, Prompts, table
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.trainer.config import compose_config
from verl.trainer.ppo.discriminator import Discriminator
from verl.workers.fsdp_workers import CriticWorker


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    yield write_model(tmp_path_factory.mktemp("model"))
    if dist.is_initialized():
        dist.destroy_process_group()


def make_step(model, *overrides):
    config = compose_config(
        [
            "stage=gad",
            "data.train_files=x",
            f"actor_rollout_ref.model.path={model}",
            "trainer.experiment_name=x",
            f"data.train_batch_size={PROMPTS}",
            "data.max_prompt_length=9",
            "data.max_response_length=8",
            f"actor_rollout_ref.rollout.n={ANSWERS}",
            "critic.optim.lr=1e-2",
            *overrides,
        ]
    )
    worker = ClassWithInitArgs(CriticWorker, config.critic, total_steps=5, device="cpu", seed=1)
    group = LocalWorkerGroup(worker)
    group.init_model()
    return Discriminator(config, group)


@contextmanager
def untimed(name):
    yield


def run(step, number=0):
    """The scores of a step's answers as a table, and its metrics."""
    data, names = batch(), {"index": np.arange(PROMPTS), "teacher_text": np.full(PROMPTS, "")}
    prompts = Prompts(**{key: data.batch[key] for key in PROMPT_KEYS + TEACHER_KEYS}, **names)
    scores, metrics = step.score_and_learn(prompts, Answers.of(data.select(list(STUDENT_KEYS))), number, untimed)
    return table(scores), metrics


def weights(step):
    return [p.detach().full_tensor().clone() for p in step.workers.worker.critic.critic_module.parameters()]


def test_rewards_are_the_scores_before_the_update_in_both_ways(model):
    """From the update's own forward, and from a pass of its own."""
    fused = make_step(model)
    separate = make_step(model, "critic.ppo_epochs=2")
    before = {name: value for name, value in separate.workers.compute_scores(batch()).batch.items()}
    for step in (fused, separate):
        data, metrics = run(step)
        for name, value in before.items():
            torch.testing.assert_close(data.batch[name], value, atol=1e-5, rtol=1e-5)
        assert metrics["critic/grad_norm"] > 0
        after = step.workers.compute_scores(batch()).batch["student_scores"]
        assert not torch.allclose(after, before["student_scores"], atol=1e-3)


def test_a_discriminator_that_wins_only_scores_and_one_that_loses_trains_twice(model):
    """By the accuracy of earlier steps; the rewards are the scores before the update all the same."""
    step = make_step(model)
    before = {name: value for name, value in step.workers.compute_scores(batch()).batch.items()}
    first = weights(step)
    step.balance.accuracy = 0.9
    data, metrics = run(step)
    assert metrics["critic/balance/epochs"] == 0 and "critic/grad_norm" not in metrics
    assert metrics["critic/d_loss"] > 0 and metrics["critic/lr"] == 1e-2
    assert all(torch.equal(a, b) for a, b in zip(weights(step), first, strict=True))
    for name, value in before.items():
        torch.testing.assert_close(data.batch[name], value, atol=1e-5, rtol=1e-5)
    accuracy = (before["teacher_scores"] > before["student_scores"]).float().mean().item()
    assert metrics["critic/balance/d_acc"] == pytest.approx(0.5 * 0.9 + 0.5 * accuracy)

    step.balance.accuracy = 0.2
    losing, usual = step, make_step(model, "critic.ppo_epochs=2", "critic.balance.enable=False")
    data, metrics = run(losing)
    _, expected = run(usual)
    assert metrics["critic/balance/epochs"] == 2
    for name in ("critic/d_loss", "critic/grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    for name, value in before.items():
        torch.testing.assert_close(data.batch[name], value, atol=1e-5, rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(losing), weights(usual), strict=True))


def test_capacity_zero_is_plain_gad(model):
    """Whatever the fraction: the same weights and metrics after three steps, bit for bit, and no replay metric."""
    plain, off = make_step(model), make_step(model, "critic.replay.fraction=0.9")
    for number in range(3):
        _, expected = run(plain, number)
        _, metrics = run(off, number)
        assert metrics == expected
        assert not any(name.startswith("critic/replay") for name in metrics)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(off), strict=True))


@pytest.mark.parametrize("split", [[], ["critic.ppo_mini_batch_size=2"], ["critic.ppo_epochs=2"]])
def test_past_groups_join_the_update_and_not_the_rewards(model, split):
    """The first step has nothing to replay; at the second, half of the answers are past ones."""
    # What it knows already is trained on all the same.
    step = make_step(model, "critic.replay.capacity=24", "critic.balance.enable=False", *split)
    seen = []
    step.workers.worker.critic.critic_module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    _, first = run(step)
    rows_of_a_plain_step = sum(seen)
    assert first["critic/replay/fraction"] == 0.0
    assert "critic/replay/d_acc" not in first
    seen.clear()
    before = {name: value for name, value in step.workers.compute_scores(batch()).batch.items()}
    seen.clear()
    data, second = run(step, 1)
    assert sum(seen) == 2 * rows_of_a_plain_step
    assert second["critic/replay/fraction"] == 0.5
    # The past groups are the ones of this very batch, so their scores are too.
    d = before["teacher_scores"] - before["student_scores"]
    assert second["critic/replay/score_diff"] == pytest.approx(d.mean().item(), abs=1e-5)
    assert second["critic/replay/d_acc"] == pytest.approx((d > 0).float().mean().item())
    for name, value in before.items():
        torch.testing.assert_close(data.batch[name], value, atol=1e-5, rtol=1e-5)
    assert data.batch["student_scores"].shape == (PROMPTS, ANSWERS)


def test_replaying_the_same_groups_gives_the_same_gradient(model):
    """The loss is a mean over pairs: every pair twice is no change."""
    plain, replaying = make_step(model), make_step(model, "critic.replay.capacity=24")
    replaying.replay.add(batch())
    _, expected = run(plain)
    _, metrics = run(replaying)
    assert metrics["critic/replay/fraction"] == 0.5
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
