"""A run of two ranks where there is little of everything at once: one CPU, 256 open files, 64 MiB of shared memory, no
network but loopback, a host name that nobody knows, a temporary folder too long for sockets, a home that cannot be
written. Needs root, for a network and mounts of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.running import read_metrics
from tests.faults.runs import Run, arguments

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

POOR = (
    "ip link set lo up && hostname nobody-knows-me && mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 256 && "
    'exec taskset -c 0 "$@"'
)
APART = ["unshare", "--net", "--uts", "--mount", "bash", "-c", POOR, "bash"]


def test_a_run_with_little_of_everything(folder, tmp_path):
    try:
        subprocess.run([*APART, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs unshare, ip, hostname, mount and taskset, as root: {error}")
    temporary = tmp_path / ("a-rather-long-job-directory" * 3)
    temporary.mkdir()
    command = [*APART, sys.executable, "-m", "verl.trainer.main_ppo", *arguments(
        folder, tmp_path / "run", "stage=seqkd", "trainer.n_gpus_per_node=2", "trainer.total_training_steps=2",
    )]  # fmt: skip
    run = Run(command, tmp_path / "run.log", HOME="/proc/none", TMPDIR=str(temporary))
    try:
        assert run.end() == 0, run.log.read_text()
    finally:
        run.stop()
    assert sorted(read_metrics(tmp_path / "run")) == [0, 1]
