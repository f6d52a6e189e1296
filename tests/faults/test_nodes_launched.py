"""The launcher with real Ray on two nodes of this machine: how they come together, and how they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.faults.runs import REPOSITORY, Run, arguments
from tests.launch.hand_made import free_port
from verl.utils.checkpoint.checkpoint_manager import tracked_step

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

LAUNCH = [sys.executable, "-m", "verl.launch"]
NODE = ["--ray=--num-cpus=1", "--ray=--num-gpus=0"]


def address_of(head: Run) -> str:
    """What the head tells its user to give the workers."""
    head.wait_until(lambda: "--worker " in head.log.read_text(), "the head names its address")
    return head.log.read_text().split("--worker ")[1].split()[0]


def stopped(*runs: Run) -> None:
    for run in runs:
        run.stop()


def test_a_signal_to_a_worker_ends_the_run_with_a_checkpoint_and_both_nodes_with_its_exit_code(folder, tmp_path):
    """Started as the stage scripts do it. A worker with another token is refused before, and so is a second head."""
    run, port = tmp_path / "run", str(free_port())
    settings = ["stage=seqkd", "trainer.nnodes=2", "trainer.total_epochs=1000", "trainer.save_freq=-1"]
    training = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments(folder, run, *settings)]
    head = Run([*LAUNCH, "--head", "--nnodes", "2", "--port", port, *NODE, "--", *training], tmp_path / "head.log")
    worker = None
    try:
        address = address_of(head)
        assert address.endswith(f":{port}")
        head.wait_until(lambda: "1 of 2 nodes: " in head.log.read_text(), "the head is up")
        token = tmp_path / ".verl_cluster_token"
        assert token.stat().st_mode & 0o777 == 0o600

        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment["PYTHONPATH"] = str(REPOSITORY)
        wrong = subprocess.run(
            [*LAUNCH, "--worker", address], env=environment | {"RAY_AUTH_TOKEN": "x" * 64}, cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert wrong.returncode == 1 and f"the token here is not that of the head at {address}" in wrong.stderr
        second = subprocess.run(
            [*LAUNCH, "--head", "--nnodes", "2", "--port", port, "--", "true"], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert second.returncode == 1 and f"port {port} of this machine is taken" in second.stderr

        worker = Run([*LAUNCH, "--worker", address, *NODE], tmp_path / "worker.log")
        metrics = run / "metrics.jsonl"
        head.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, "two steps")
        assert "all 2 nodes are there: " in head.log.read_text()
        # To the group, as Slurm does it: Ray is out of its reach.
        os.killpg(worker.process.pid, signal.SIGTERM)
        assert (head.end(), worker.end()) == (143, 143), head.log.read_text() + worker.log.read_text()
        said = head.log.read_text()
        assert "got SIGTERM: the run is told" in said and "the run ends after this step, with a checkpoint" in said
        assert tracked_step(run) is not None
        assert head.left_behind(10) == [] and worker.left_behind(10) == []
        assert not token.exists()
    finally:
        stopped(*(run for run in (head, worker) if run is not None))


def test_a_head_that_is_killed_takes_its_worker_with_it_and_a_missing_node_is_waited_for_in_vain(tmp_path):
    port = str(free_port())
    flags = ["--head", "--port", port, *NODE]
    head = Run([*LAUNCH, *flags, "--nnodes", "3", "--wait", "45", "--", "true"], tmp_path / "head.log")
    worker = Run([*LAUNCH, "--worker", address_of(head), *NODE], tmp_path / "worker.log")
    try:
        assert (head.end(), worker.end()) == (1, 1)
        assert "there are 2 nodes of the 3 after 45 s (--wait): " in head.log.read_text()
        assert "the run is over (exit code 1)" in worker.log.read_text()
    finally:
        stopped(head, worker)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    head = Run([*LAUNCH, *flags, "--nnodes", "2", "--", *command], tmp_path / "second.log")
    worker = Run([*LAUNCH, "--worker", address_of(head), *NODE], tmp_path / "second_worker.log")
    try:
        head.wait_until(lambda: "all 2 nodes are there" in head.log.read_text(), "both nodes are there")
        head.stop()
        assert worker.end() == 1
        assert "this node ends" in worker.log.read_text() or "Ray has ended on this node" in worker.log.read_text()
        assert worker.left_behind(10) == []
    finally:
        stopped(head, worker)
