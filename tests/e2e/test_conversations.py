"""Stages on whole conversations: every assistant turn is a row, as if it stood in a file as one."""

from __future__ import annotations

import json

import pytest
import torch

from tests.e2e.running import assert_equal_tensors, read_metrics
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def files(folder):
    """Conversations of two turns, and the same written out by hand as one row a turn."""
    talks, rows = [], []
    for n in range(6):
        first, second = ("a?", f"It {n}."), ("色?", "红")
        before = [{"role": "user", "content": first[0]}]
        later = [*before, {"role": "assistant", "content": first[1]}, {"role": "user", "content": second[0]}]
        talks.append({"content": [*later, {"role": "assistant", "content": second[1]}]})
        rows += [{"content": before, "teacher_response": first[1]}, {"content": later, "teacher_response": second[1]}]
    for name, records in (("talks", talks), ("rows", rows)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)

    def overrides(name):
        file = f"{folder}/{name}.jsonl"
        turns = "all" if name == "talks" else "none"
        return f"data.train_files={file}", f"data.val_files={file}", f"data.turns={turns}"

    return overrides


def numbers(run):
    """The metrics that are no times or memory, by step."""
    apart = ("timing", "perf", "memory")
    found = read_metrics(run).items()
    return {step: {k: v for k, v in data.items() if not any(a in k for a in apart)} for step, data in found}


def actor_of(run, step):
    return read_full_tensors(run / f"global_step_{step}" / "actor" / "model")


def test_seqkd_on_conversations_is_that_on_their_turns_and_resumes(run, files):
    seqkd = ("stage=seqkd", "trainer.critic_warmup=-1", "trainer.test_freq=1", "trainer.save_freq=2")
    by_turn = run("by_turn", *seqkd, *files("rows"), steps=4)
    whole = run("whole", *seqkd, *files("talks"), steps=4)
    assert numbers(whole) == numbers(by_turn)
    parts = [run("parts", *seqkd, *files("talks"), "trainer.resume_mode=auto", steps=steps) for steps in (2, 4)]
    assert_equal_tensors(actor_of(parts[1], 4), actor_of(by_turn, 4))
    with pytest.raises(ValueError, match=r"data\.turns=all, now last"):
        run("parts", *seqkd, *files("talks")[:2], "data.turns=last", "trainer.resume_mode=auto", steps=6)


def test_every_turn_has_its_answers_and_scores(run, files):
    runs = [run(f"warmup_{name}", *files(name), steps=2) for name in ("rows", "talks")]
    by_turn, whole = map(numbers, runs)
    assert whole == by_turn
    assert torch.tensor([whole[1]["critic/d_acc"], whole[1]["critic/d_loss"]]).isfinite().all()
