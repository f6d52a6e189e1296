"""How far long work is, in a log."""

import pytest

from verl.utils import progress
from verl.utils.progress import Progress


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(capsys, monkeypatch):
    now = iter([0.0, 30.0, 61.0, 61.0, 100.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with Progress(5, "answers of a\x1b[2J", "prompt") as work:
        work.update(2)
        work.update()
        work.update()
    shown = "answers of a\ufffd[2J: "
    assert capsys.readouterr().err.splitlines() == [
        f"{shown}3 of 5 prompts in 61 s",
        f"{shown}4 of 5 prompts in 2.2 min",
    ]


def test_what_ended_in_an_error_says_how_far_it_was(capsys):
    with pytest.raises(KeyError), Progress(5, "answers", "prompt") as work:
        work.update(2)
        raise KeyError
    assert capsys.readouterr().err == "answers: 2 of 5 prompts in 0 s\n"


def test_a_terminal_gets_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(2, "answers", "prompt") as work:
        work.update(2)
    shown = capsys.readouterr().err
    assert "answers: 100%" in shown and "2/2" in shown and "of 2" not in shown
