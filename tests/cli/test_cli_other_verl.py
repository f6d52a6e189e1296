"""A second distribution named verl beside this one: said at the start, with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl.cli.other_verl import OURS, others, warn_of_another_verl

ROOT = Path(__file__).parents[2]
UPSTREAM = "Metadata-Version: 2.4\nName: verl\nVersion: 0.6.1\nSummary: Another trainer\nAuthor: Others\n\nSummary: x\n"
OWN = f"Metadata-Version: 2.4\nName: verl\nVersion: 0.0.9\nSummary: {OURS}: SeqKD\n\n"


def place(folder: Path, metadata: str, name: str = "verl-0.6.1.dist-info", file: str = "METADATA") -> Path:
    """A folder of packages with a distribution's metadata in it."""
    (folder / name).mkdir(parents=True)
    (folder / name / file).write_text(metadata)
    return folder


def test_the_command_says_so_once_and_goes_on(tmp_path):
    folder = place(tmp_path / "site", UPSTREAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "verl.cli", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("verl ")
    assert len(done.stderr.splitlines()) == 1
    for words in ("verl 0.6.1", str(folder), "`pip uninstall verl`", "install this one again"):
        assert words in done.stderr


def test_what_lies_in_the_same_or_an_earlier_entry_counts(tmp_path):
    other, home = place(tmp_path / "other", UPSTREAM), tmp_path / "home"
    home.mkdir()
    assert list(others([str(other), str(home)], home)) == [("0.6.1", str(other))]
    assert list(others([str(home), str(other)], home)) == []
    # Where this package is found by other means than the path, all of it is earlier.
    assert list(others([str(other)], home)) == [("0.6.1", str(other))]
    place(home, OWN, "verl-0.0.9.dist-info")
    assert list(others([str(home)], home)) == []
    place(home, UPSTREAM, "verl.egg-info", "PKG-INFO")
    assert list(others([str(home), str(other)], home)) == [("0.6.1", str(home))]


@pytest.mark.parametrize("name", ["verl_extra-1.0.dist-info", "verl-tools-1.0.dist-info", "averl-1.dist-info", "verl"])
def test_other_names_are_none(name, tmp_path):
    place(tmp_path, UPSTREAM, name)
    assert list(others([str(tmp_path), "/nowhere", ""], tmp_path)) == []


def test_a_package_in_the_folder_at_hand_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    (tmp_path / "verl").mkdir()
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        warn_of_another_verl()
        assert capsys.readouterr().err == ""
    (tmp_path / "verl/__init__.py").write_text("")
    warn_of_another_verl()
    assert f"{tmp_path} has a package verl of its own" in capsys.readouterr().err


def test_metadata_that_cannot_be_read_is_another_one(tmp_path):
    (tmp_path / "verl-0.5.dist-info").mkdir()
    assert list(others([str(tmp_path)], tmp_path)) == [("of unknown version", str(tmp_path))]


def test_it_takes_no_time_and_imports_nothing():
    best = min(_seconds() for _ in range(5))
    assert best < 0.05
    code = (
        "import sys; import verl.cli.main; from verl.cli.other_verl import warn_of_another_verl as w; w(); "
        "print('importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def _seconds() -> float:
    start = time.thread_time()
    list(others(sys.path, Path("/")))
    return time.thread_time() - start
