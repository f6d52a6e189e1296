"""The quick start's edges: what it may write over, how it is stopped, what it does without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from examples.quickstart import run
from examples.quickstart.run import REPOSITORY


def left(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            file.mkdir()
        else:
            file.touch()
    return folder


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ((run.MARK,), True),  # stopped at once
        (("raw/train.json", "train.parquet"), True),  # stopped before there was a base, by a version without a mark
        (("base/", "raw/train.json", "train.parquet", "checkpoints/"), True),
        (("train.parquet",), False),
        (("raw/a.json", "train.parquet", "test.parquet", "notes.txt"), False),
    ],
)
def test_what_a_quick_start_leaves_is_known_and_nothing_else(names, known, tmp_path, monkeypatch, capsys):
    out = left(tmp_path / "out", *names)
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(out)])
    if known:
        assert run.parse().out == out
        return
    with pytest.raises(SystemExit) as end:
        run.parse()
    assert end.value.code == 2 and f"{out} holds something else" in capsys.readouterr().err


def test_data_are_not_looked_at_without_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    run.check_data(tmp_path)
    said = capsys.readouterr().out
    assert said == "data: not looked at, as datasketch is not installed: pip install -e '.[data]'\n"


def test_a_stage_that_fails_is_named_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "call", lambda command, **how: 3)
    with pytest.raises(SystemExit, match="SeqKD has ended with exit code 3"):
        run.run_stage(run.STAGES[0], tmp_path, 1, "cpu", [])


def test_ctrl_c_ends_it_in_a_line(tmp_path):
    """The whole group gets the signal, as from a terminal. What it leaves is known again."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.quickstart.run", "--out", str(tmp_path / "out")], cwd=REPOSITORY,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not process.stdout.readline().startswith("[1/4]"):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "\nended by Ctrl-C: the same command begins anew\n"
    assert run.is_quick_start(tmp_path / "out")
