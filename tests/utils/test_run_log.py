"""What goes to the terminal, what to the run's folder, and what a folder that cannot be written does to a run."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from verl.utils import run_log
from verl.utils.run_log import TerminalHandler, log_to, phase

ours, library = logging.getLogger("verl.somewhere"), logging.getLogger("engine")


@pytest.fixture
def terminal(monkeypatch):
    """Standard error, with the handler for it alone at the root."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    handler, level = TerminalHandler(), root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: stream.getvalue()
    root.removeHandler(handler)
    root.setLevel(level)


def test_the_terminal_gets_what_is_ours_and_warnings_and_the_file_everything(terminal, tmp_path):
    with log_to(tmp_path):
        ours.info("a sentence")
        library.info("chatter")
        library.warning("look \x1b[2J here")
        library.warning("Token authentication is enabled for this Ray cluster.")
        library.warning("Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.")
    said = [line[9:] for line in terminal().splitlines()]
    assert said == ["a sentence", "WARNING engine: look \ufffd[2J here"]
    kept = (tmp_path / "logs" / "driver.log").read_text()
    for part in (
        "INFO verl.somewhere: a sentence",
        "INFO engine: chatter",
        "\ufffd[2J",
        "Token authentication",
        "gemm_4bit",
    ):
        assert part in kept
    ours.info("after it")
    assert "after it" not in (tmp_path / "logs" / "driver.log").read_text()


def test_a_second_run_goes_on_in_the_same_file(tmp_path, terminal):
    for sentence in ("first", "second"):
        with log_to(tmp_path):
            ours.info(sentence)
    assert [line[-6:] for line in (tmp_path / "logs" / "driver.log").read_text().splitlines()] == [" first", "second"]


def test_what_ends_a_run_is_kept(tmp_path, terminal):
    with pytest.raises(ValueError, match="because"), log_to(tmp_path):
        raise ValueError("because")
    kept = (tmp_path / "logs" / "driver.log").read_text()
    assert "Traceback" in kept and "ValueError: because" in kept and "Traceback" not in terminal()


def test_a_full_disk_ends_no_run_and_is_said_once(terminal, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "driver.log").symlink_to("/dev/full")
    with log_to(tmp_path):
        ours.info("one")
        ours.info("two")
    said = terminal()
    assert said.count("driver.log cannot be written ([Errno 28] No space left on device): the run goes on") == 1
    assert "one" in said and "two" in said


def test_a_folder_that_cannot_be_made(terminal, tmp_path):
    (tmp_path / "logs").write_text("a file")
    with log_to(tmp_path):
        ours.info("one")
    assert "the run goes on without" in terminal() and "one" in terminal()


def test_a_phase_is_said_when_it_begins_and_with_its_seconds_when_it_ends(terminal, monkeypatch):
    clock = iter([0.0, 9.4, 0.0, 12.3, 0.0, 600.0])
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for what in ("short", "longer", "long"):
        with phase(what):
            assert terminal().endswith(f" {what} ...\n")
    said = [line[9:] for line in terminal().splitlines()]
    assert said == ["short ...", "longer ...", "longer: done in 12 s", "long ...", "long: done in 10 min"]
