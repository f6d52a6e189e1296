"""Signals to runs on Ray: the step at hand is made and saved, the exit code says which, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.e2e.running import assert_equal_tensors, read_metrics
from tests.faults.runs import REPOSITORY, Run, arguments, lines_of, trainer
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

LONG = ("stage=seqkd", "trainer.total_training_steps=1000", "trainer.save_freq=-1", "trainer.total_epochs=1000")
# The step at hand, a checkpoint and Ray's end take a few seconds; the machine may be busy with others.
SOON_S = 60


def steps_saved(folder) -> list[int]:
    return sorted(int(found.name.split("_")[-1]) for found in folder.glob("global_step_*"))


def wait_for_a_step(run, folder):
    # The file is there before its first line.
    run.wait_until(lambda: lines_of(folder / "metrics.jsonl") >= 1, "the first step")


def test_sigterm_to_the_whole_group_saves_and_the_run_goes_on_as_if_nothing_had_been(folder, tmp_path):
    """The group has Ray's processes too: systemd and Slurm end all of a job at once, `timeout` one process and then the
    group. Two ranks."""
    ended, whole = tmp_path / "ended", tmp_path / "whole"
    ranks = (*LONG, "trainer.n_gpus_per_node=2")
    run = trainer(folder, ended, *ranks)
    try:
        wait_for_a_step(run, ended)
        start = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.log.read_text()
        assert time.monotonic() - start < SOON_S
        assert run.left_behind(10) == []
    finally:
        run.stop()
    (step,) = steps_saved(ended)
    assert sorted(read_metrics(ended)) == list(range(step)), "a step that is saved and not logged, or the reverse"
    assert "Traceback" not in run.log.read_text()

    def finish(name):
        run = trainer(folder, name, *ranks, f"trainer.total_training_steps={step + 2}")
        assert run.end() == 0, run.log.read_text()
        return read_full_tensors(name / f"global_step_{step + 2}" / "actor" / "model")

    resumed = finish(ended)
    assert f"{step} steps are done" in run.log.read_text()
    assert_equal_tensors(resumed, finish(whole))
    losses = [{n: data["actor/sft_loss"] for n, data in read_metrics(name).items()} for name in (ended, whole)]
    assert losses[0] == losses[1]


def test_sigint_and_a_second_signal(folder, tmp_path):
    """The second one, at once behind the first, ends the run before the step is saved."""
    run = trainer(folder, tmp_path / "run", *LONG)
    try:
        wait_for_a_step(run, tmp_path / "run")
        run.process.send_signal(signal.SIGINT)
        run.wait_until(lambda: "SIGINT: the run ends after this step" in run.log.read_text(), "the signal is noticed")
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGINT, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()


def test_a_signal_while_models_are_built_ends_at_once(folder, tmp_path):
    run = trainer(folder, tmp_path / "run", *LONG)
    try:
        run.wait_until(lambda: "building models" in run.log.read_text(), "models are built")
        run.process.send_signal(signal.SIGHUP)
        assert run.end() == 128 + signal.SIGHUP, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    assert "Traceback" not in run.log.read_text() and "ended by SIGHUP" in run.log.read_text()
    assert steps_saved(tmp_path / "run") == []


def test_sigterm_to_a_stage_script_ends_the_trainer_with_a_checkpoint_and_tensorboard(folder, tmp_path):
    run = tmp_path / "run"
    script = [
        "bash", str(REPOSITORY / "scripts/train/gpt5-8b-gad-gspo.sh"), "--model", str(folder / "base"),
        "--reward_model", str(folder / "base"), "--exp_name", "run",
        *arguments(folder, run, *LONG[1:], "trainer.critic_warmup=1"),
    ]  # fmt: skip
    script = Run(script, tmp_path / "run.log", PYTHON=sys.executable, N_GPUS_PER_NODE="1", TENSORBOARD_PORT="0")
    try:
        wait_for_a_step(script, run)
        script.process.send_signal(signal.SIGTERM)
        assert script.end() == 128 + signal.SIGTERM, script.log.read_text()
        assert script.left_behind(10) == []
    finally:
        script.stop()
    assert len(steps_saved(run)) == 1
