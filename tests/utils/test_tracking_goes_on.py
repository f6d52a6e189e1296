"""Trackers go on: over crashes, resumed runs, fresh starts in used folders, and full disks."""

import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from verl.utils.dump import dump_jsonl
from verl.utils.tracking import Tracking, ValidationGenerationsLogger, check_loggers

# TensorBoard's writer says so in a thread of its own, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def no_logger_environment(monkeypatch):
    for name in (
        "VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT", "TENSORBOARD_DIR", "WANDB_MODE", "WANDB_RUN_ID",
        "WANDB_API_KEY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def numbered_from_zero(monkeypatch):
    """TensorBoard numbers a process' files and reads those of one second in the order of their names: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scalars(folder, name="x"):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def track(folder, backend, values, **how):
    """Log `values`, one a step; the run then ends as if it had been killed."""
    tracking = Tracking("p", "e", backend, log_dir=folder, **how)
    for step, value in values.items():
        tracking.log({"x": value}, step)
    return tracking


# ---- TensorBoard


def test_steps_made_again_stand_once_in_tensorboard(tmp_path):
    track(tmp_path, "tensorboard", {step: float(step) for step in range(5)}, resumed=False)
    track(tmp_path, "tensorboard", {3: 30.0, 4: 40.0, 5: 50.0}, first_step=3)
    track(tmp_path, "tensorboard", {5: 500.0}, first_step=5)
    assert scalars(tmp_path / "tensorboard") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 500.0)]


def test_a_fresh_start_moves_earlier_events_aside(tmp_path):
    track(tmp_path, "tensorboard", {0: 1.0, 1: 2.0}, resumed=False)
    os.utime(next((tmp_path / "tensorboard").iterdir()), (0, 951_782_400))
    track(tmp_path, "tensorboard", {0: 5.0}, resumed=False)
    assert scalars(tmp_path / "tensorboard") == [(0, 5.0)]
    (aside,) = (path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir())
    assert aside.name.startswith("2000022") and scalars(aside) == [(0, 1.0), (1, 2.0)]


def test_a_look_at_an_earlier_checkpoint_takes_nothing_away(tmp_path):
    """trainer.val_only."""
    track(tmp_path, "tensorboard", {0: 0.0, 1: 1.0, 2: 2.0}, resumed=False)
    track(tmp_path, "tensorboard", {1: 10.0}, resumed=True, first_step=None)
    assert len(scalars(tmp_path / "tensorboard")) == 4


# ---- the metrics file


@pytest.mark.parametrize("rest", ['{"step": 1, "da', "{", '{"step": 1, "data": {"名'])
def test_a_cut_line_does_not_swallow_the_next(tmp_path, rest, caplog):
    track(tmp_path, "file", {0: 0.5}).finish()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + rest.encode()[: len(rest.encode()) - ("名" in rest)])
    track(tmp_path, "file", {1: 1.5, 2: 2.5}).finish()
    assert [(line["step"], line["data"]["x"]) for line in read_lines(file)] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert "cut short, which is taken out" in caplog.text


def test_a_whole_line_without_its_end_is_kept(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "data": {"x": 0.5}}')
    track(tmp_path, "file", {1: 1.5}).finish()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert caplog.text == ""


def test_an_empty_file_is_none_to_mend(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").touch()
    track(tmp_path, "file", {1: 1.5}).finish()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1 and caplog.text == ""


def test_fresh_starts_within_a_second_keep_all_files(tmp_path):
    for value in (1.0, 2.0, 3.0):
        track(tmp_path, "file", {0: value}, resumed=False).finish()
        os.utime(tmp_path / "metrics.jsonl", (0, 951_782_400))
    values = sorted(line["data"]["x"] for file in tmp_path.glob("*.jsonl") for line in read_lines(file))
    assert values == [1.0, 2.0, 3.0]


def test_a_device_is_written_to_and_never_moved(monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/dev/null")
    track(None, "file", {0: 1.0}, resumed=False).finish()
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


# ---- a full disk


@contextmanager
def disk_full_after(size):
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_lines_wait_for_room(tmp_path, caplog):
    tracking = track(tmp_path, "file", {0: 0.0})
    file = tmp_path / "metrics.jsonl"
    # Room for a part of the next line.
    with disk_full_after(file.stat().st_size + 10):
        for step in (1, 2):
            tracking.log({"x": float(step)}, step)
    assert caplog.text.count("could not write") == 1 and "step 1" in caplog.text and "the run goes on" in caplog.text
    tracking.log({"x": 3.0}, 3)
    assert "FileBackend writes again" in caplog.text
    assert [(line["step"], line["data"]["x"]) for line in read_lines(file)] == [(n, float(n)) for n in range(4)]
    tracking.finish()


def test_lines_that_still_wait_at_the_end_do_not_end_the_run_either(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/dev/full")
    with Tracking("p", "e", ["file", "console"], log_dir=tmp_path) as tracking:
        tracking.log({"x": 1.0}, 0)
    tracking.finish()
    assert "No space left on device" in caplog.text


def test_tensorboard_goes_on_when_there_is_room_again(tmp_path, caplog):
    tracking = track(tmp_path, "tensorboard", {0: 0.0, 1: 1.0}, resumed=False)
    events = next((tmp_path / "tensorboard").iterdir())
    with disk_full_after(events.stat().st_size + 10):
        for step in (2, 3):
            tracking.log({"x": float(step), "y": 1.0}, step)
    ValidationGenerationsLogger().log(tracking, [("a", "b", "c", 0.5)], 4)
    tracking.log({"x": 4.0}, 4)
    tracking.finish()
    assert caplog.text.count("TensorBoardBackend could not write step 2") == 1
    assert scalars(tmp_path / "tensorboard") == [(step, float(step)) for step in range(5)]


def test_other_backends_are_not_kept_from_writing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/dev/full")
    with Tracking("p", "e", ["file", "console"], log_dir=tmp_path) as tracking:
        tracking.log({"x": 1.0}, 0)
    assert capsys.readouterr().out == "step:0 - x:1\n"


def test_dumped_answers_are_worth_no_run(tmp_path, caplog):
    with disk_full_after(100):
        dump_jsonl(tmp_path / "1.jsonl", [{"answer": "x" * 10000}])
    assert "1.jsonl could not be written" in caplog.text
    with pytest.raises(TypeError):
        dump_jsonl(tmp_path / "2.jsonl", [{"answer": {1, 2}}])


# ---- Weights & Biases


@pytest.fixture
def offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it looks at its settings once in a process
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)

    def ids():
        # offline-run-TIME-ID, numbered where two began in one second
        return [path.name.split("-")[3] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]

    yield ids
    wandb.teardown()


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, offline, monkeypatch):
    track(tmp_path / "run", "wandb", {0: 1.0}, resumed=False).finish()
    track(tmp_path / "run", "wandb", {1: 1.0}, first_step=1).finish()
    (first,) = set(offline())
    track(tmp_path / "run", "wandb", {0: 1.0}, resumed=False).finish()
    fresh = (tmp_path / "run" / "wandb_run_id.txt").read_text()
    assert set(offline()) == {first, fresh} and fresh != first
    track(tmp_path / "run", "wandb", {1: 1.0}, first_step=1).finish()
    track(tmp_path / "other", "wandb", {1: 1.0}, first_step=1).finish()
    assert len(set(offline())) == 3 and offline().count(fresh) == 2
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    track(tmp_path / "run", "wandb", {0: 1.0}, resumed=False).finish()
    assert "chosen" in offline()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, r"no key.*wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"),
        ({"WANDB_MODE": "offline"}, "passed"),
        ({"WANDB_API_KEY": "0" * 40}, "passed"),
    ],
)
def test_a_missing_key_is_found_before_anything_starts(tmp_path, environment, says):
    """In a process of its own: wandb looks at its settings once."""
    pytest.importorskip("wandb")
    code = "from verl.utils.tracking import check_loggers; check_loggers(['console', 'wandb']); print('passed')"
    settings = {
        **os.environ,
        "PYTHONPATH": os.getcwd(),
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=settings,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.search(says, done.stdout + done.stderr), done.stderr
    assert not (tmp_path / "netrc").exists()


def test_unknown_and_missing_loggers_are_found_too(monkeypatch):
    check_loggers("file")
    with pytest.raises(ValueError, match="unknown logger 'clearml'"):
        check_loggers(["clearml"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        check_loggers("wandb")
