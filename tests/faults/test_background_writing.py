"""Checkpoints of two ranks on Ray that are written in the background onto a disk that is slow, fills up, or is cut off
by the end of the run."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.faults.runs import REPOSITORY, lines_of, trainer
from verl.utils.checkpoint.checkpoint_manager import step_of, tracked_step, verify_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

SETTINGS = (
    "stage=seqkd", "trainer.async_save=True", "trainer.n_gpus_per_node=2", "trainer.save_freq=2",
    "trainer.total_training_steps=200", "trainer.total_epochs=100",
)  # fmt: skip
# Every process of the run takes its time to get a file to the disk; a checkpoint of 2 x 2 shards takes several steps.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slowly(descriptor):
    time.sleep(0.7)
    fsync(descriptor)
os.fsync = slowly
"""


@pytest.fixture
def start(folder, tmp_path):
    """`start(name, *settings)`: a run in `tmp_path/name`, whose disk is slow."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    runs = []

    def begin(name, *settings):
        path = f"{tmp_path}/slow:{REPOSITORY}"
        runs.append(trainer(folder, tmp_path / name, *SETTINGS, *settings, PYTHONPATH=path))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


def steps(run):
    return sorted(step_of(folder) for folder in run.glob("global_step_*") if folder.suffix == "")


def wait_for_a_step(run, where):
    """Until a step has been made since a save began: the first line from now on may be that of the step it followed."""
    before = lines_of(where / "metrics.jsonl")
    run.wait_until(
        lambda: lines_of(where / "metrics.jsonl") >= before + 2, "a step is made while a checkpoint is written"
    )


def test_a_kill_resumes_from_the_one_before_and_a_signal_waits_for_both(start, tmp_path):
    run, where = start("run"), tmp_path / "run"
    second = where / "global_step_4.tmp"
    run.wait_until(second.is_dir, "the second save begins")
    wait_for_a_step(run, where)
    assert second.is_dir() and steps(where) == [2]
    os.killpg(run.process.pid, signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    run.stop()
    assert steps(where) == [2] and tracked_step(where) == 2

    run = start("run")
    # By then what was left half written is gone.
    run.wait_until(lambda: "2 steps are done" in run.log.read_text(), "it resumes")
    run.wait_until(second.is_dir, "the second save begins again")
    wait_for_a_step(run, where)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.log.read_text()
    assert run.left_behind(10) == []
    assert "Traceback" not in run.log.read_text()
    saved = steps(where)
    assert saved[:2] == [2, 4] and 4 < saved[-1] == tracked_step(where)
    for step in saved:
        verify_checkpoint(where / f"global_step_{step}")
    assert not list(where.glob("*.tmp"))


def test_a_disk_that_fills_up_ends_the_run_at_the_next_step(start, tmp_path):
    """While the first shard is on its way to the disk, another takes what room the second would need."""
    where = tmp_path / "run"
    where.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", where], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, to mount a small disk: {error}")
    try:
        run = start("run")
        second = where / "global_step_4.tmp"
        run.wait_until(lambda: any((second / "actor" / "model").glob("*.safetensors")), "the second save writes")
        with (where / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space left"):
            while True:
                fill.write(bytes(4096))
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
        last = run.log.read_text().strip().splitlines()[-1]
        assert "the disk is full" in last and str(second) in last
        assert steps(where) == [2] and tracked_step(where) == 2
        verify_checkpoint(where / "global_step_2")
    finally:
        subprocess.run(["umount", "-l", where], check=True)
