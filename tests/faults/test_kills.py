"""kill -9, again and again, of a run that is started by the same settings until it is done: nothing is lost but what
came after the last save, and its end is that of a run that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.running import assert_equal_tensors, read_metrics
from tests.faults.killed_runs import KILLS, STEPS
from tests.faults.runs import PATIENCE_S, REPOSITORY
from verl.utils.checkpoint.sharded import read_full_tensors

SEED = 14
PARTS = ("actor/model", "actor/optim", "critic/model", "critic/optim")


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
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    metrics = [
        {step: {name: value for name, value in data.items() if name.startswith(("actor/", "critic/", "val/"))}
         for step, data in read_metrics(run).items()}
        for run in (killed, whole)
    ]  # fmt: skip
    assert list(metrics[0]) == list(range(STEPS + 1)) or sorted(metrics[0]) == sorted(metrics[1])
    assert metrics[0] == metrics[1]
