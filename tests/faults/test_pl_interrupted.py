"""A pipeline of three stages that is ended in each of them, in three ways, and started again by the same line: what it
leaves is that of one which was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.e2e.running import assert_equal_tensors
from tests.faults.runs import Run
from verl.utils.checkpoint.checkpoint_manager import tracked_step
from verl.utils.checkpoint.sharded import read_full_tensors

STEPS, STAGES = 10, ("seqkd", "warmup", "gad")
# Three starts of Ray, a merger and a judge, on a machine that is busy with others.
PATIENCE_S = 1800

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(4 * PATIENCE_S)]


def pipeline(folder, out, log, *more):
    """Started; its output goes to `log`."""
    line = [
        sys.executable, "-m", "verl.pipeline", "--model", str(folder / "base"), "--data", str(folder / "train.jsonl"),
        "--val", str(folder / "held_out.jsonl"), "--exp_name", "it", "--out", str(out), "--stages", ",".join(STAGES),
        "trainer.device=cpu", "data.train_batch_size=4", "data.max_prompt_length=28", "data.max_response_length=10",
        "actor_rollout_ref.rollout.n=3", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1",
        "trainer.test_freq=4", "algorithm.cut_answers=keep", "warmup.trainer.critic_warmup=3", "trainer.logger=[file]",
        "actor_rollout_ref.actor.optim.lr=1e-3", "critic.optim.lr=1e-3", *more,
    ]  # fmt: skip
    return Run(line, log, N_GPUS_PER_NODE="1")


def until_saved(run, stage, step):
    """Return when that stage has a checkpoint of so many steps, and not yet its last."""
    deadline = time.monotonic() + PATIENCE_S
    while (tracked_step(stage) or 0) < step:
        assert run.process.poll() is None and time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.05)
    assert tracked_step(stage) < STEPS, "too late to be interrupted"


def ended(run):
    code = run.process.wait(PATIENCE_S)
    assert run.left_behind(60) == []
    return code


@pytest.fixture(scope="module")
def held_out(folder):
    """Prompts that are not among those trained on."""
    with (folder / "held_out.jsonl").open("w") as file:
        for row in range(6):
            content = [{"role": "user", "content": f"b{row}!"}]
            file.write(json.dumps({"content": content, "teacher_response": f"It is {row}."}) + "\n")


def test_ended_in_every_stage_it_leaves_the_same_weights(folder, held_out, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = pipeline(folder, whole, tmp_path / "whole.log")
    assert ended(run) == 0, run.log.read_text()

    run = pipeline(folder, parts, tmp_path / "first.log")
    until_saved(run, parts / "seqkd", 2)
    os.kill(run.process.pid, signal.SIGKILL)
    assert ended(run) == -signal.SIGKILL
    # Its trainer heard of it: the step at hand was saved.
    assert "SIGTERM: the run ends after this step" in run.log.read_text()

    run = pipeline(folder, parts, tmp_path / "second.log")
    until_saved(run, parts / "warmup", 2)
    run.stop()
    assert run.left_behind(60) == []

    run = pipeline(folder, parts, tmp_path / "third.log")
    until_saved(run, parts / "gad", 2)
    run.process.send_signal(signal.SIGTERM)
    assert ended(run) == 128 + signal.SIGTERM, run.log.read_text()

    run = pipeline(folder, parts, tmp_path / "fourth.log")
    assert ended(run) == 0, run.log.read_text()
    said = run.log.read_text()
    assert f"[1/3] seqkd: done, {STEPS} steps" in said and f"[2/3] warmup: done, {STEPS} steps" in said
    assert "[3/3] gad: goes on after step" in said

    for stage in STAGES:
        for part in ("actor",) if stage == "seqkd" else ("actor", "critic"):
            models = (out / stage / f"global_step_{STEPS}" / part / "model" for out in (parts, whole))
            assert_equal_tensors(*map(read_full_tensors, models))
        assert_equal_tensors(*(load_file(out / "students" / stage / "model.safetensors") for out in (parts, whole)))
    judged = (json.loads((out / "judge/at_0.8/judge.json").read_text())["students"] for out in (parts, whole))
    assert next(judged) == next(judged)

    # All is there: nothing is trained, merged or judged again.
    files = {file: file.stat().st_mtime_ns for file in parts.rglob("*") if file.is_file()}
    run = pipeline(folder, parts, tmp_path / "fifth.log")
    assert ended(run) == 0, run.log.read_text()
    again = {file for file in parts.rglob("*") if file.is_file() and files.get(file) != file.stat().st_mtime_ns}
    assert {file.name for file in again} <= {"run.lock"}
