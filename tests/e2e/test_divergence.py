"""Runs that diverge, most on one rank in this process: what is skipped, kept, saved and said."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.e2e.running import read_metrics, train
from verl.trainer.config import ConfigError
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in, step_of
from verl.utils.checkpoint.recovery import newest_whole

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
# A loss of the user's own: nan in the steps that SPOILT names. A step's batch is the only one of four groups.
LOSS = """
import torch
steps = [-1]
def compute(scores, **constants):
    steps[0] += len(scores.student) == 4
    loss = torch.nn.functional.softplus(scores.student - scores.teacher).mean()
    return (loss * float("nan") if steps[0] in SPOILT else loss), {}
"""
# The same on two ranks, two groups each: nan on rank 1 alone, from step 2 on.
LOSS_OF_ONE_RANK = """
import torch
steps = [-1]
def compute(scores, **constants):
    at_work = torch.distributed.is_initialized() and len(scores.student) == 2
    steps[0] += at_work
    loss = torch.nn.functional.softplus(scores.student - scores.teacher).mean()
    bad = at_work and torch.distributed.get_rank() == 1 and steps[0] >= 2
    return (loss * float("nan") if bad else loss), {}
"""


@pytest.fixture
def spoilt(folder, request):
    """Settings under which the discriminator's loss is nan in the given steps."""

    def settings(*steps):
        file = folder / f"{request.node.name}.py"
        file.write_text(LOSS.replace("SPOILT", repr(set(steps))))
        return f"critic.discriminator.loss={file}:compute", "critic.balance.enable=False"

    return settings


def saved(run):
    return [step_of(folder) for folder in checkpoints_in(run)]


def test_a_bad_step_is_skipped_counted_and_kept(folder, run, spoilt, caplog):
    path = run("one", *spoilt(1), "trainer.save_freq=1", steps=4)
    metrics = read_metrics(path)
    counts = {step: data.get("critic/skipped_steps", 0) for step, data in metrics.items()}
    assert counts == {0: 0, 1: 1, 2: 0, 3: 0}
    assert "critic/grad_norm" not in metrics[1] and metrics[2]["critic/grad_norm"] > 0
    assert saved(path) == [1, 3, 4], "not while updates are skipped"
    assert "step 1: an update of the critic was not finite and was skipped (1 in a row, 3 end the run)" in caplog.text
    with safe_open(path / "skipped_steps" / "1.safetensors", "pt") as batch:
        assert {"input_ids", "responses", "student_scores", "advantages"} <= set(batch.keys())
        assert batch.get_tensor("responses").shape == (4, 3, 10)
        assert len(json.loads(batch.metadata()["teacher_text"])) == 4


def test_too_many_in_a_row_end_the_run(folder, run, spoilt):
    words = r"the last 2 steps had an update .*max_skipped_steps=2.*critic/lr 0\.001.*global_step_1, global_step_2;"
    with pytest.raises(FloatingPointError, match=words):
        run("row", *spoilt(2, 3), "trainer.save_freq=1", "trainer.max_skipped_steps=2", steps=6)
    path = folder / "runs" / "row"
    assert saved(path) == [1, 2]
    assert read_metrics(path)[3]["critic/skipped_steps"] == 1
    assert len(list((path / "skipped_steps").iterdir())) == 2


def test_a_run_does_not_end_well_with_a_skipped_step(folder, run, spoilt):
    with pytest.raises(FloatingPointError, match="the last 1 steps"):
        run("last", *spoilt(2), "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1", steps=3)
    path = folder / "runs" / "last"
    assert (path / "global_step_2" / "actor").is_dir(), "what it began with is not pruned for it"
    assert newest_whole(path, ("actor", "critic")) == path / "global_step_3"


@pytest.mark.distributed
def test_one_ranks_loss_is_everyones_verdict(folder):
    """On Ray; with one checkpoint kept, the one before the newest is there until the newest has proven itself."""
    (folder / "one_rank.py").write_text(LOSS_OF_ONE_RANK)
    with pytest.raises(FloatingPointError, match=r"the last 2 steps.*global_step_1, global_step_2;"):
        train(
            folder, "two", "stage=warmup", "trainer.critic_warmup=1", "trainer.n_gpus_per_node=2",
            f"critic.model.path={folder}/base", f"critic.discriminator.loss={folder}/one_rank.py:compute",
            "critic.balance.enable=False", "trainer.val_before_train=False", "trainer.test_freq=-1",
            "trainer.save_freq=1", "trainer.total_training_steps=6", "trainer.max_skipped_steps=2",
            "trainer.max_actor_ckpt_to_keep=1", "trainer.max_critic_ckpt_to_keep=1",
        )  # fmt: skip
    path = folder / "runs" / "two"
    assert saved(path) == [1, 2]
    assert [data.get("critic/skipped_steps") for data in read_metrics(path).values()] == [None, None, 1, 1]


@pytest.mark.parametrize("keep", ["1", "null"])
def test_a_learning_rate_that_breaks_the_model(folder, run, keep):
    """From step 3 on the student is broken by a rate that comes late: what it was before is still there."""
    rates = (f"trainer.max_actor_ckpt_to_keep={keep}", "trainer.save_freq=1", "stage=seqkd", "trainer.critic_warmup=-1")
    run(f"rate-{keep}", *rates, steps=2)
    with pytest.raises(FloatingPointError, match="the last 3 steps"):
        run(f"rate-{keep}", *rates, f"{ACTOR}.optim.lr=1e30", steps=9)
    path = folder / "runs" / f"rate-{keep}"
    assert saved(path) == ([2, 3] if keep == "1" else [1, 2, 3])
    named = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={path}/global_step_2")
    run(f"rate-{keep}", *rates, *named, steps=4)
    assert read_metrics(path)[3]["actor/grad_norm"] > 0


def test_weights_that_are_not_finite_are_not_saved(folder, run):
    """The last step's update overflows: no step follows that would notice."""
    with pytest.raises(FloatingPointError, match=r"tensors of the actor are not finite, e\.g\..*not saved"):
        run("overflow", "stage=seqkd", "trainer.critic_warmup=-1", f"{ACTOR}.optim.lr=3e37",
            f"{ACTOR}.optim.weight_decay=11", steps=1)  # fmt: skip
    assert saved(folder / "runs" / "overflow") == []


def test_a_student_that_cannot_answer_is_named(folder, run):
    with pytest.raises(FloatingPointError, match=r"the student cannot answer.*optim\.lr"):
        run("mute", f"{ACTOR}.optim.lr=1e30", steps=4)


@pytest.mark.parametrize("rate", ["inf", ".inf", "nan", "-1"])
def test_rates_that_are_no_rates_are_refused(run, rate):
    with pytest.raises(ConfigError, match="lr"):
        run("refused", f"{ACTOR}.optim.lr={rate}")
