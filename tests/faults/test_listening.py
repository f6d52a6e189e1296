"""Who can reach a run on one machine: nobody from outside, and inside nobody without its token."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import lines_of, listeners, trainer
from verl.single_controller.ray.starting import LOOPBACK

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

INTRUDER = """
import ray
from ray._private import ray_constants
ray_constants.ENABLE_RAY_CLUSTER = False  # 127.0.0.1 stays what it is
ray.init(address="127.0.0.1:{port}", log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "code of mine ran").remote(), timeout=30))
"""


def test_a_run_of_two_ranks_listens_on_loopback_and_answers_with_a_token_alone(folder, tmp_path):
    """In a home that cannot be written. The ranks are up and have met when the first step is logged."""
    run = trainer(
        folder, tmp_path / "run", "stage=seqkd", "trainer.n_gpus_per_node=2", "trainer.total_training_steps=1000",
        "trainer.save_freq=-1", HOME="/proc/none",
    )  # fmt: skip
    try:
        run.wait_until(lambda: lines_of(tmp_path / "run" / "metrics.jsonl") >= 1, "the first step")
        processes = run.processes()
        found = listeners(processes)
        names = {listener.process for listener in found}
        assert {"gcs_server", "raylet"} <= names and any(name.startswith("ray::") for name in names), found
        assert [listener for listener in found if listener.address not in (LOOPBACK, "::1")] == []
        port = next(listener.port for listener in found if listener.process == "gcs_server")
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        intruder = [sys.executable, "-c", INTRUDER.format(port=port)]
        said = subprocess.run(intruder, env=environment, capture_output=True, text=True, timeout=120)
        assert said.returncode != 0 and "ran" not in said.stdout
        assert "AuthenticationError" in said.stderr, said.stderr
        token = {process.environ()["RAY_AUTH_TOKEN"] for process in processes if process.name() == "raylet"}
        assert len(token) == 1
        allowed = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.pop()}
        said = subprocess.run(intruder, env=allowed, capture_output=True, text=True, timeout=120)
        assert "code of mine ran" in said.stdout, said.stderr
        readable = [Path(f"/proc/{process.pid}/environ").stat().st_mode for process in processes]
        assert all(stat.S_IMODE(mode) == 0o400 for mode in readable)
    finally:
        run.stop()
