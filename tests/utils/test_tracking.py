import json
import re
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from verl.utils.tracking import Tracking, ValidationGenerationsLogger, WandbBackend

SAMPLES = [
    ("Say hi.", "Hi there!", "Hi!", 0.6667),
    ("写一首诗", "```\n春眠|不觉晓\n```", "床前明月光\n疑是地上霜", 0.0),
    ("third", "third answer", "third teacher", 1.0),
]


@pytest.fixture(autouse=True)
def no_logger_environment(monkeypatch):
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT", "TENSORBOARD_DIR"):
        monkeypatch.delenv(name, raising=False)


def read_lines(path):
    # parse_constant is called for NaN and Infinity, which are not JSON
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


# ---- console


def test_console_line(capsys):
    Tracking("p", "e").log({"actor/sft_loss": 1.25, "n": 3, "lr": 5e-6, "third": 1 / 3}, step=7)
    assert capsys.readouterr().out == "step:7 - actor/sft_loss:1.25 - n:3 - lr:5e-06 - third:0.333333\n"


def test_console_line_survives_a_progress_bar(capsys):
    with tqdm(total=2, file=sys.stdout, disable=False) as bar:
        bar.update(1)
        Tracking("p", "e").log({"x": 1.0}, step=1)
    # the bar is wiped off its line before the metrics are written, so they begin a line of their own
    assert re.search(r"[\r\n]step:1 - x:1\n", capsys.readouterr().out)


def test_console_shows_three_short_samples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    sample = ("p" * 300, "a\nb", "床前明月光疑是地上霜举头望明月低头思故乡", 0.5, 0.25, -1.125, 4, "stop")
    ValidationGenerationsLogger().log(Tracking("p", "e"), [sample, *SAMPLES], step=4)
    lines = capsys.readouterr().out.splitlines()
    # Eleven columns for the label, one free at the end: 28 for the text, which are 14 Chinese characters.
    assert lines[:8] == [
        "step:4 - sample 1 of 4 - rouge-L 0.500 - score 0.25, teacher -1.12 - 4 tokens, stop",
        f"  prompt   {'p' * 28}",
        f"           {'p' * 28}",
        f"           {'p' * 25}...",
        "  teacher  床前明月光疑是地上霜举头望明",
        "           月低头思故乡",
        "  student  a b",
        "step:4 - sample 2 of 4 - rouge-L 0.667",
    ]
    assert lines[8:11] == ["  prompt   Say hi.", "  teacher  Hi!", "  student  Hi there!"]
    assert len([line for line in lines if line.startswith("step:4")]) == 3


# ---- file


@pytest.mark.parametrize("name", ["file", "jsonl"])
def test_file_has_one_line_per_step(tmp_path, name):
    with Tracking("p", "e", default_backend=name, log_dir=tmp_path / "new") as tracking:
        tracking.log({"critic/d_loss": 0.5, "count": 2}, step=0)
        # on disk while the run goes on
        assert read_lines(tmp_path / "new" / "metrics.jsonl") == [
            {"step": 0, "data": {"critic/d_loss": 0.5, "count": 2}}
        ]
        tracking.log({"critic/d_loss": 0.25, "教师": 1.0}, step=1)
    with Tracking("p", "e", default_backend=name, log_dir=tmp_path / "new") as resumed:
        resumed.log({"critic/d_loss": 0.125}, step=2)
    lines = read_lines(tmp_path / "new" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["data"] == {"critic/d_loss": 0.25, "教师": 1.0}


def test_file_keeps_non_finite_values_as_strings(tmp_path):
    with Tracking("p", "e", default_backend="file", log_dir=tmp_path) as tracking:
        tracking.log({"a": float("nan"), "b": torch.tensor(float("inf")), "c": -np.float64("inf"), "d": 1.5}, step=3)
    line = read_lines(tmp_path / "metrics.jsonl")[0]
    assert line == {"step": 3, "data": {"a": "nan", "b": "inf", "c": "-inf", "d": 1.5}}
    assert float(line["data"]["c"]) == float("-inf")


def test_file_location_from_the_environment(tmp_path, monkeypatch):
    def log_once():
        with Tracking("proj", "exp", default_backend="file", log_dir=tmp_path / "log_dir") as tracking:
            tracking.log({"x": 1}, step=0)

    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path / "root"))
    log_once()
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "exactly" / "here.jsonl"))
    log_once()
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    assert written == ["exactly/here.jsonl", "root/proj/exp.jsonl"]


def test_default_log_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracking("proj", "exp", default_backend="file") as tracking:
        tracking.log({"x": 1}, step=0)
    assert len(read_lines(tmp_path / "logs" / "proj" / "exp" / "metrics.jsonl")) == 1


# ---- TensorBoard


def test_tensorboard_scalars_read_back(tmp_path):
    tracking = Tracking("p", "e", default_backend=["tensorboard"], tensorboard_dir=tmp_path / "tb")
    tracking.log({"val/rouge-L/mean": 0.5, "n": 2}, step=1)
    tracking.log({"val/rouge-L/mean": 0.75}, step=5)
    events = read_events(tmp_path / "tb")  # before finish: a killed run keeps its steps
    assert [(e.step, e.value) for e in events.Scalars("val/rouge-L/mean")] == [(1, 0.5), (5, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("n")] == [(1, 2.0)]
    tracking.finish()


def test_tensorboard_folder(tmp_path, monkeypatch):
    Tracking("p", "e", default_backend="tensorboard", log_dir=tmp_path / "a").finish()
    assert list((tmp_path / "a" / "tensorboard").glob("events.*"))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "b"))
    Tracking("p", "e", default_backend="tensorboard", log_dir=tmp_path / "c").finish()
    assert list((tmp_path / "b").glob("events.*"))
    assert not (tmp_path / "c").exists()


def test_tensorboard_samples_are_markdown(tmp_path):
    with Tracking("p", "e", default_backend="tensorboard", tensorboard_dir=tmp_path) as tracking:
        ValidationGenerationsLogger().log(tracking, SAMPLES[1:2], step=9)
    (event,) = read_events(tmp_path).Tensors("val/generations/text_summary")
    assert event.step == 9
    assert event.tensor_proto.string_val[0].decode() == "\n".join(
        [
            "## 1. rouge-L 0.000",
            "",
            "**prompt**",
            "",
            "    写一首诗",
            "",
            "**teacher**",
            "",
            "    床前明月光",
            "    疑是地上霜",
            "",
            "**student**",
            "",
            "    ```",
            "    春眠|不觉晓",
            "    ```",
            "",
        ]
    )


# ---- wandb


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "trackio"])
def test_a_missing_package_is_a_clear_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # import then fails as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}"):
        Tracking("p", "e", default_backend=["console", name])


def test_a_folder_of_runs_is_no_package(tmp_path, monkeypatch):
    """W&B leaves its runs in ./wandb, and the working folder is where Python looks first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        WandbBackend.check_installed()


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with Tracking("p", "e", default_backend="wandb", config={"lr": 1e-6}, log_dir=tmp_path) as tracking:
        tracking.log({"x": 1.5}, step=1)
        ValidationGenerationsLogger().log(tracking, SAMPLES, step=1)
        tracking.log({"y": 2.0}, step=2)  # wandb closes a step when the next one begins
        assert tracking.flush()
        run = tracking.backends[0].run
        assert run.config["lr"] == 1e-6
        assert run.summary["x"] == 1.5
        assert run.summary["val/generations"]["nrows"] == 3


# ---- all of them


def test_several_backends_and_aliases(tmp_path, capsys):
    with Tracking("p", "e", ["console", "file", "jsonl", "tensorboard"], log_dir=tmp_path) as tracking:
        assert len(tracking.backends) == 3
        tracking.log({"x": 1.5}, step=2)
    tracking.finish()  # once more does no harm
    assert capsys.readouterr().out == "step:2 - x:1.5\n"
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert read_events(tmp_path / "tensorboard").Scalars("x")[0].value == 1.5


def test_unknown_backend_names_the_known_ones(tmp_path):
    known = "console, tensorboard, file, jsonl, wandb, mlflow, swanlab, trackio"
    with pytest.raises(ValueError, match=f"unknown logger 'clearml': known are {known}"):
        Tracking("p", "e", default_backend=["file", "clearml"], log_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_of_every_accepted_kind(tmp_path):
    values = {
        "i": 3,
        "f": 0.5,
        "t": torch.tensor(2.0, requires_grad=True),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    values |= {"np": np.float32(0.25), "npi": np.int64(4), "a0": np.array(1.0)}
    with Tracking("p", "e", default_backend="file", log_dir=tmp_path) as tracking:
        tracking.log(values, step=0)
    data = read_lines(tmp_path / "metrics.jsonl")[0]["data"]
    assert data == {"i": 3, "f": 0.5, "t": 2.0, "b": 1.5, "np": 0.25, "npi": 4, "a0": 1.0}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("high", "str"),
        (None, "NoneType"),
        (True, "bool"),
        ([1.0], "list"),
        (torch.zeros(2), r"Tensor of shape \(2,\)"),
        (np.zeros((1,)), r"ndarray of shape \(1,\)"),
        (torch.tensor(True), "bool"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, value, kind):
    tracking = Tracking("p", "e", default_backend="file", log_dir=tmp_path)
    with pytest.raises(TypeError, match=f"metric 'critic/odd' is a {kind}"):
        tracking.log({"fine": 1.0, "critic/odd": value}, step=0)
    tracking.finish()
    assert read_lines(tmp_path / "metrics.jsonl") == []
