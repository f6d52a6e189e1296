"""What an update counts of its work, and what a worker reports after it: the learning rate and the MFU."""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import causal_lm, scorer
from tests.workers.updates_setup import EOS, batch, pairs_of, settings
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.pairs import PairPolicy
from verl.workers.critic.dp_critic import DataParallelPPOCritic
from verl.workers.updates import Work, build_optimizer
from verl.workers.worker_base import FSDPWorker

# Prompts of 5, 1, 9 and 3 tokens, three answers to each, and the teacher's of 3, 8, 2 and 6 tokens.
STUDENTS = [13, 6, 8, 3, 8, 5, 14, 14, 10, 9, 5, 11]
TEACHERS = [8, 9, 11, 9]


def actor_for(loss: str, *overrides: str) -> DataParallelPPOActor:
    config, module = settings(loss, overrides=list(overrides)).actor_rollout_ref, PolicyModel(causal_lm())
    return DataParallelPPOActor(config.actor, config.rollout, module, torch.optim.AdamW(module.parameters(), lr=0.0))


def test_students_share_their_prompt():
    actor = actor_for("gspo")
    actor.update_policy(batch())
    assert actor.work == Work(STUDENTS, [0, 5, 5, 0, 1, 1, 0, 9, 9, 0, 3, 3])


def test_work_is_of_every_epoch_and_of_the_last_update_only():
    actor = actor_for("sft", "actor_rollout_ref.actor.ppo_epochs=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2")
    for _ in range(2):
        actor.update_policy(batch())
    assert actor.work == Work(TEACHERS * 2, [0] * 8)


def test_the_two_answers_of_a_pair_share_their_prompt():
    policy, data = PairPolicy(actor_for("soda")), pairs_of(batch())
    policy.update(data, settings("soda").soda)
    # Teacher's and student's first, pair by pair.
    assert policy.work == Work([8, 13, 9, 3, 11, 14, 9, 9], [0, 5, 0, 1, 0, 9, 0, 3])


@pytest.mark.parametrize("update", ["update_critic", "score_and_update"])
def test_a_group_has_its_prompt_once(update):
    """The teacher's answer has it. Equal answers, which go through the model once, count each."""
    module, data = ScoreModel(scorer()), batch()
    data.meta_info["mini_batches"] = 1
    critic = DataParallelPPOCritic(
        settings("bradley_terry").critic, module, torch.optim.AdamW(module.parameters(), lr=0.0), EOS
    )
    getattr(critic, update)(data)
    assert critic.work == Work(STUDENTS + TEACHERS, [5, 5, 5, 1, 1, 1, 9, 9, 9, 3, 3, 3])


def worker_on(device: str, sequence_parallel_size: int = 1) -> FSDPWorker:
    worker = FSDPWorker.__new__(FSDPWorker)
    worker.device, worker.update_seconds = device, 2.0
    worker.module = SimpleNamespace(sequence_parallel_size=sequence_parallel_size)
    worker.shape = SimpleNamespace(parameters=10, layers=2, heads=2, head_dim=3, frozen=0)
    return worker


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    # 6 x 10 parameters x 5 tokens, and three times the attention of (2 x 16 + 2 x 9 - 2 x 4) x width 6 x 2 layers.
    share = (300 + 3 * 504) / (2.0 * 989e12)
    assert worker_on("cuda:0").mfu("actor", Work([4, 3], [2])) == {"perf/mfu/actor": pytest.approx(share)}
    # Of two ranks that share the tokens each has done half of the work.
    assert worker_on("cuda:0", 2).mfu("actor", Work([4, 3], [2])) == {"perf/mfu/actor": pytest.approx(share / 2)}


def test_no_mfu_where_no_peak_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert worker_on("cuda:0").mfu("actor", Work([4], [])) == worker_on("cpu").mfu("actor", Work([4], [])) == {}


def test_the_rate_is_that_of_the_update_and_then_the_schedule_goes_on():
    worker, optim = worker_on("cpu"), settings("sft", overrides=[
        "actor_rollout_ref.actor.optim.lr=0.5", "actor_rollout_ref.actor.optim.lr_warmup_steps=4",
    ]).actor_rollout_ref.actor.optim  # fmt: skip
    optimizer, worker.lr_scheduler = build_optimizer(torch.nn.Linear(1, 1), optim, total_steps=10)
    rates = []
    for _ in range(3):
        used = optimizer.param_groups[0]["lr"]
        rates.append(worker.finish_update())
        assert rates[-1] == used
    assert len(set(rates)) == 3
