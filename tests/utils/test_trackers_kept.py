"""MLflow, SwanLab and Trackio with their own local stores: what is logged is read back.

Each is skipped where its package is not installed. They are no part of the test extra: MLflow takes 235 MB, and between
them they want older versions of pyarrow, protobuf and pillow than the trainer is tested with.
"""

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from verl.utils.tracking import Tracking, ValidationGenerationsLogger, check_loggers

ROOT = Path(__file__).parents[2]
SAMPLES = [
    ("写一首诗", "春眠不觉晓", "床前明月光", 0.5, 0.25, -1.5, 7, "stop"),
    ("hi", "", "ho", 0.0, 1.0, 2.0, 9, "length"),
]
CONFIG = {"trainer": {"lr": 1e-6, "logger": ["console"], "none": None}, "long": "x" * 3000}
METRICS = {"critic/d_acc": 0.5, "val/rouge-L/mean": 0.25, "教师": 1.0, "odd@name": 2.0, "n": 3}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Everything that they keep, under `tmp_path`."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "SWANLAB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


def train(folder, name, steps, **how):
    """Log steps, the samples and an alarm in the first, and end."""
    with Tracking("project", "run", [name, "file"], config=CONFIG, log_dir=folder, **how) as tracking:
        for step in steps:
            tracking.log(METRICS | {"x": float(step), "bad": float("nan"), "great": float("inf")}, step)
            if step == steps[0]:
                ValidationGenerationsLogger().log(tracking, SAMPLES, step)
                tracking.alert("too_strong", f"step {step}: ALARM", step)
        assert tracking.flush()


def train_twice(tmp_path, name, caplog):
    """A run of steps 0 to 3 that goes on from 3 to 5, and another one in its folder."""
    train(tmp_path / "run", name, range(4), resumed=False)
    train(tmp_path / "run", name, range(3, 6), first_step=3)
    train(tmp_path / "run", name, range(2), resumed=False)
    assert [record.message for record in caplog.records if record.name.startswith("verl.")] == []


def test_mlflow(tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/kept.db")
    train_twice(tmp_path, "mlflow", caplog)
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name("project").experiment_id], order_by=["start_time ASC"])
    first, second = found
    assert [run.info.run_name for run in found] == ["run"] * 2 and {run.info.status for run in found} == {"FINISHED"}
    kept = (tmp_path / "run" / "mlflow_run_id.txt").read_text()
    assert kept == second.info.run_id
    # The step that was made again is there twice.
    history = client.get_metric_history(first.info.run_id, "x")
    assert sorted((point.step, point.value) for point in history) == [(n, float(n)) for n in (0, 1, 2, 3, 3, 4, 5)]
    data = second.data
    assert {name: data.metrics[name] for name in ("critic/d_acc", "val/rouge-L/mean", "教师", "odd_name", "n")} == {
        "critic/d_acc": 0.5, "val/rouge-L/mean": 0.25, "教师": 1.0, "odd_name": 2.0, "n": 3.0,
    }  # fmt: skip
    assert math.isnan(data.metrics["bad"]) and data.metrics["great"] > 1e300
    assert data.params["trainer.lr"] == "1e-06" and data.params["trainer.logger"] == "['console']"
    assert data.tags["alarms/too_strong"] == "step 0: ALARM"
    text = mlflow.artifacts.load_text(f"runs:/{second.info.run_id}/val_generations/step_0.md")
    assert "## 1. rouge-L 0.500 - score 0.25, teacher -1.5 - 7 tokens, stop" in text and "    床前明月光" in text
    # A run that is named and not there.
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    train(tmp_path / "run", "mlflow", range(1))
    assert len(client.search_runs([first.info.experiment_id])) == 3


def test_swanlab(tmp_path, caplog):
    pytest.importorskip("swanlab")
    train_twice(tmp_path, "swanlab", caplog)
    logs = tmp_path / "run" / "swanlog"
    runs = sorted(logs.glob("run-*"), key=lambda path: path.stat().st_ctime)
    ids = [path.name.split("-")[2] for path in runs]
    assert len(ids) == 3 and ids[0] == ids[1] != ids[2] == (tmp_path / "run" / "swanlab_run_id.txt").read_text()
    record = next(runs[2].glob("*.swanlab")).read_bytes()
    for name in METRICS:
        assert name.encode() in record, name
    texts = [path.read_text() for path in (runs[2] / "media" / "text").iterdir()]
    assert any("teacher -1.5" in text and "    床前明月光" in text for text in texts)
    assert "step 0: ALARM" in texts
    assert "lr: 1.0e-06" in (runs[2] / "files" / "config.yaml").read_text()


def test_swanlab_without_a_key_is_found_before_anything_starts(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    check_loggers("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "online")
    with pytest.raises(ValueError, match=r"no key: run `swanlab login` or set SWANLAB_API_KEY, set SWANLAB_MODE"):
        check_loggers(["console", "swanlab"])
    monkeypatch.setenv("SWANLAB_API_KEY", "0" * 20)
    check_loggers(["console", "swanlab"])


def test_trackio(tmp_path):
    """In a process of its own: where runs are kept is looked up once."""
    pytest.importorskip("trackio")
    environment = {
        **os.environ, "TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    }  # fmt: skip
    code = """
import logging, sys
from pathlib import Path
from tests.utils.test_trackers_kept import train

logging.basicConfig(format="SAID %(name)s %(message)s")
run = Path("run")
train(run, "trackio", range(4), resumed=False)
train(run, "trackio", range(3, 6), first_step=3)
train(run, "trackio", range(2), resumed=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "SAID verl" not in done.stderr, done.stderr
    with closing(sqlite3.connect(tmp_path / "kept" / "project.db")) as kept:
        rows = list(kept.execute("select run_id, run_name, step, metrics from metrics order by id"))
        alarms = list(kept.execute("select title, text, level, step from alerts order by id"))
        configs = list(kept.execute("select run_id, config from configs"))
    logged = [(run, step, json.loads(data)) for run, _, step, data in rows]
    values = [(run, step, data["x"]) for run, step, data in logged if "x" in data]
    first, second = dict.fromkeys(run for run, _, _ in values)
    assert {name for _, name, _, _ in rows} == {"run"}
    assert [(step, x) for run, step, x in values if run == first] == [(n, float(n)) for n in (0, 1, 2, 3, 3, 4, 5)]
    assert [(step, x) for run, step, x in values if run == second] == [(0, 0.0), (1, 1.0)]
    data = logged[0][2]
    assert METRICS.items() <= data.items() and data["bad"] == "NaN" and data["great"] == "Infinity"
    tables = [(step, data["val/generations"]["_value"]) for _, step, data in logged if "val/generations" in data]
    assert [step for step, _ in tables] == [0, 3, 0]
    assert tables[0][1][0]["teacher"] == "床前明月光" and tables[0][1][1]["finish_reason"] == "length"
    assert alarms[0] == ("too_strong", "step 0: ALARM", "warn", 0)
    assert json.loads(dict(configs)[first])["trainer"]["lr"] == 1e-6
