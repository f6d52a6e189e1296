"""Runs on Ray in which something hangs: it is named, and ends the run with the stacks of all ranks."""

from __future__ import annotations

import re
import time

import pytest

from tests.faults.runs import lines_of, trainer

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

LONG = ("trainer.total_training_steps=1000", "trainer.save_freq=-1", "trainer.total_epochs=1000")
# Starting two ranks takes half of that on a busy machine.
LIMITS = ("trainer.stall_warning=20", "trainer.stall_timeout=60")
SOON_S = 120


def rank_of_the_run(run, rank):
    """The process that Ray started for a rank: the oldest with its number."""
    found = [process for process in run.processes() if process.environ().get("RANK") == str(rank)]
    return min(found, key=lambda process: process.create_time())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_is_stopped(folder, tmp_path, ranks):
    run = trainer(folder, tmp_path / "run", "stage=seqkd", *LONG, *LIMITS, f"trainer.n_gpus_per_node={ranks}")
    try:
        run.wait_until(lambda: lines_of(tmp_path / "run" / "metrics.jsonl") >= 1, "the first step")
        start = time.monotonic()
        rank_of_the_run(run, ranks - 1).suspend()
        assert run.end() == 1, run.log.read_text()
        assert 60 <= time.monotonic() - start < SOON_S
        assert run.left_behind(10) == []
    finally:
        run.stop()
    log = run.log.read_text()
    nor = r", nor has rank 0," if ranks == 2 else ""
    stopped = rf"actor_rollout rank {ranks - 1} of {ranks} \(stopped\) has not answered \w+(?:{nor})?"
    assert re.search(rf"WARNING verl.utils.stalls: {stopped} for 2\d s", log)
    assert re.search(rf"\nrank {ranks - 1} of {ranks}: process \d+, stopped, \d+ threads.*\nIt gave no stacks", log)
    if ranks == 2:
        assert re.search(r"rank 0 of 2: process \d+, \w+, \d+ threads[^\0]*in call\n", log)
    assert re.search(r"the driver, process \d+:[^\0]*in _make_steps\n", log)
    last = log.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"verl.utils.stalls.StallError: {stopped} for \d+ s, which is more than trainer.stall_timeout=60 s allows; .*",
        last,
    )


def test_a_reward_that_sleeps(folder, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "import time\nseen = []\ndef compute_score(p, a, t):\n    seen.append(a)\n"
        "    if len(seen) == 14:\n        asks_a_server_that_is_gone()\n    return 1.0\n"
        "def asks_a_server_that_is_gone():\n    try:\n        time.sleep(10_000)\n    except Exception:\n        pass\n"
    )
    run = trainer(
        folder, tmp_path / "run", "stage=warmup", f"critic.model.path={folder}/base", *LONG, *LIMITS,
        f"custom_reward_function.path={reward}", "algorithm.task_reward_weight=1", "trainer.critic_warmup=1",
    )  # fmt: skip
    try:
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    log = run.log.read_text()
    named = (
        rf"custom_reward_function {re.escape(str(reward))}:compute_score, data row \d+, answer 1: has not returned for"
    )
    assert re.search(rf"WARNING verl.utils.stalls: {named} 2\d s", log)
    assert "in asks_a_server_that_is_gone\n" in log and re.search(r"rank 0 of 1: process \d+, sleeping", log)
    assert re.match(rf"verl.utils.stalls.StallError: {named} \d+ s, which", log.strip().splitlines()[-1])


def test_a_raylet_that_is_stopped(folder, tmp_path):
    """Ray takes its node for dead after a minute; nothing but force ends it."""
    run = trainer(folder, tmp_path / "run", "stage=seqkd", *LONG, "trainer.total_training_steps=100000")
    try:
        run.wait_until(lambda: lines_of(tmp_path / "run" / "metrics.jsonl") >= 1, "the first step")
        (raylet,) = [process for process in run.processes() if process.name() == "raylet"]
        raylet.suspend()
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    assert "Ray has not ended for 30 s: its processes on this machine are killed" in run.log.read_text()
