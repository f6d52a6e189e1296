"""kill -9, again and again, of a run that is started by the same settings until it is done: nothing is lost but what
came after the last save, and its end is that of a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e.running import assert_equal_tensors, read_metrics
from tests.faults.killed_runs import KILLS, STEPS
from tests.faults.runs import PATIENCE_S, REPOSITORY, Run, lines_of, trainer
from verl.utils.checkpoint.checkpoint_manager import tracked_step
from verl.utils.checkpoint.sharded import read_full_tensors

SEED = 14
PARTS = ("actor/model", "actor/optim", "critic/model", "critic/optim")


@pytest.mark.faults
@pytest.mark.parametrize("way", ["chosen", "random"])
def test_twenty_kills_of_one_process(tmp_path, way):
    """Seeds are fixed, so chosen moments are the same each time; random ones are as exact as a sleep is."""
    print(f"seed {SEED}")
    command = [sys.executable, "-m", "tests.faults.killed_runs", str(tmp_path), way, str(SEED)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3 * PATIENCE_S)
    print(done.stdout)
    logs = "".join(log.read_text()[-4000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    *lives, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) == KILLS and all(life["killed"] for life in lives if way == "chosen"), logs
    assert last["status"] == 0, logs
    for life in [*lives, last]:
        # At least what the tracker had named; more where a checkpoint was whole and not named yet.
        if life["began"] is not None and life["saved"] is not None:
            assert life["saved"] <= life["began"] <= life["saved"] + 1
    killed, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    for part in PARTS:
        found, expected = (read_full_tensors(run / f"global_step_{STEPS}" / part) for run in (killed, whole))
        assert_equal_tensors(found, expected)
    # A fresh start, after a kill before the first save, moves the metrics of the one before aside.
    left = {path.name for path in killed.iterdir() if not path.match("metrics.*.jsonl")}
    assert left == {path.name for path in whole.iterdir()}
    metrics = [
        {step: {name: value for name, value in data.items() if name.startswith(("actor/", "critic/", "val/"))}
         for step, data in read_metrics(run).items()}
        for run in (killed, whole)
    ]  # fmt: skip
    assert list(metrics[0]) == list(range(STEPS + 1)) or sorted(metrics[0]) == sorted(metrics[1])
    assert metrics[0] == metrics[1]


# ---- on Ray

# One run is killed again and again. The raylet's and the gcs's end is noticed late, maybe after the last step: each has
# a run of its own.
VICTIMS = {"driver": "killed", "rank 0": "killed", "rank 1": "killed", "raylet": "raylet", "gcs_server": "gcs"}
STEPS_ON_RAY = 40
WHOLE = ("stage=seqkd", "trainer.n_gpus_per_node=2", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=2",
         "trainer.total_epochs=100", f"trainer.total_training_steps={STEPS_ON_RAY}")  # fmt: skip


def victim_of(run: Run, name: str) -> psutil.Process:
    if name == "driver":
        return psutil.Process(run.process.pid)
    if name.startswith("rank"):
        return next(p for p in run.processes() if p.name().startswith("ray::") and rank_of(p) == name.split()[1])
    return next(process for process in run.processes() if process.name() == name)


def rank_of(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


@pytest.mark.faults
@pytest.mark.distributed
def test_each_kind_of_process_of_two_ranks_killed_at_a_random_moment(folder, tmp_path):
    """The same command each time; what dies with a process is the run, never its folder."""
    chance = random.Random(SEED)
    for victim, name in VICTIMS.items():
        killed = tmp_path / name
        log = killed / "metrics.jsonl"
        delay, more, before = round(chance.uniform(0, 1), 3), chance.randint(1, 3), lines_of(log)
        saved = tracked_step(killed) if killed.is_dir() else None
        run = trainer(folder, killed, *WHOLE)
        try:
            run.wait_until(lambda log=log, n=before + more: lines_of(log) >= n, f"{more} more steps")
            time.sleep(delay)
            victim_of(run, victim).kill()
            start, code = time.monotonic(), run.end()
            took = time.monotonic() - start
            print(f"seed {SEED}: {victim} killed {delay} s after {more} steps: exit {code} after {took:.1f} s")
            if saved is not None:
                assert f"{saved} steps are done" in run.log.read_text() or f"{saved + 1} steps" in run.log.read_text()
        finally:
            run.stop()
        done = tracked_step(killed) == STEPS_ON_RAY
        assert code == {"driver": -9}.get(victim, 0 if done else 1), run.log.read_text()[-4000:]
    whole, *others = ends = [tmp_path / name for name in ("whole", "killed", "raylet", "gcs")]
    for path in ends:
        run = trainer(folder, path, *WHOLE)
        assert run.end() == 0, run.log.read_text()[-4000:]
        run.stop()
    losses = [{step: data["actor/sft_loss"] for step, data in read_metrics(path).items()} for path in ends]
    assert sorted(losses[0]) == list(range(STEPS_ON_RAY))
    for path, found in zip(others, losses[1:], strict=True):
        assert found == losses[0], path
        for part in PARTS[:2]:
            weights, expected = (read_full_tensors(end / f"global_step_{STEPS_ON_RAY}" / part) for end in (path, whole))
            assert_equal_tensors(weights, expected)
