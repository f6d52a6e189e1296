"""A run whose model and data are names of the hub goes on with the same commits of both, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import read_metrics
from tests.hub_server import Hub, serving
from tests.tiny import write_data, write_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from tests.e2e.running import train
from verl.trainer.in_process import run_in_process
folder, steps, model, data = sys.argv[1:]
train(__import__("pathlib").Path(folder), "run", "stage=seqkd", f"trainer.total_training_steps={steps}",
      "trainer.test_freq=-1", "trainer.val_before_train=False", "trainer.save_freq=1", "data.val_files=org/rows/test",
      f"actor_rollout_ref.model.path={model}", f"data.train_files={data}", run_with=run_in_process)
"""


pytestmark = pytest.mark.faults


def test_a_run_from_the_hub_is_pinned(tmp_path):
    files = {path.name: path.read_bytes() for path in write_model(tmp_path / "base").iterdir()}
    rows = {f"{name}.jsonl": write_data(tmp_path / f"{name}.jsonl", 9).read_bytes() for name in ("train", "test")}
    hub, record = Hub(), tmp_path / "runs/run/run.json"
    first, data = hub.push("models", "org/tiny", files), hub.push("datasets", "org/rows", rows)

    def start(steps: int, model: str = "org/tiny", rows: str = "hf://org/rows@main/train", **variables: str) -> str:
        settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(steps), model, rows], cwd=tmp_path,
            env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", **variables}, capture_output=True, text=True,
        )  # fmt: skip
        return done.stderr if done.returncode else ""

    with serving(hub) as endpoint:
        assert start(1) == ""
        # Nothing but the README is new: equal weights, and another revision all the same.
        second = hub.push("models", "org/tiny", files | {"README.md": b"new"})
        refused = start(2)
        moved = hub.push("datasets", "org/rows", rows | {"more.txt": b"new"})
        refused_data = start(2, f"org/tiny@{first}")
    assert f"actor_rollout_ref.model.path=org/tiny@{first}, now org/tiny@{second}" in refused
    where = f"hf://org/rows@{data}/train.jsonl"
    assert f"data.train_files={where}, now hf://org/rows@{moved}/train.jsonl" in refused_data
    # What a refusal names can be named, and needs no hub; a local copy of it is the same too.
    assert start(2, f"org/tiny@{first}", where, HF_HUB_OFFLINE="1") == ""
    assert start(3, str(tmp_path / "base"), str(tmp_path / "train.jsonl"), HF_HUB_OFFLINE="1") == ""
    assert sorted(read_metrics(tmp_path / "runs/run")) == [0, 1, 2]
    origin = json.loads((tmp_path / "runs/run/global_step_2/origin.json").read_text())
    assert origin["actor"]["revision"] == first
    assert (origin["data"]["where"], origin["data"]["revision"]) == (where, data)
    starts = json.loads(record.read_text())["starts"]
    assert starts[1]["hub"]["actor_rollout_ref.model.path"] == [f"org/tiny@{first}"]
    assert starts[1]["hub"]["data.train_files"] == [where]
    assert "actor_rollout_ref.model.path" not in starts[2]["hub"]
