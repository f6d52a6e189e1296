"""What a terminal without a text's characters shows."""

from __future__ import annotations

import io
import sys

import pytest

from verl.utils.console import printable
from verl.utils.tracking import ConsoleBackend, Sample


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "grass is ??? ?"), ("gbk", "grass is 绿色的 ?"), ("utf-8", "grass is 绿色的 😀")]
)
def test_characters_that_the_terminal_lacks_become_question_marks(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print(printable("grass is 绿色的 😀"), flush=True)
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


def test_standard_output_without_an_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert printable("绿色") == "绿色"


# Sets the title, asks for the cursor's place, clears the screen (in one byte), writes over the line, turns it round.
OBEYED = "\x1b]0;title\x07 \x1b[6n \x9b2J \rover \u202edlrow"


def test_a_terminal_is_told_nothing_by_data(capsys):
    shown = printable(f"line\tone\r\nline two {OBEYED}\n")
    assert shown == "line\tone\nline two \ufffd]0;title\ufffd \ufffd[6n \ufffd2J \ufffdover \ufffddlrow\n"
    ConsoleBackend(None).log_samples([Sample(OBEYED, f"a{OBEYED}", "天\n地", 0.5)], step=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step:3 - sample with rouge-L 0.500" and lines[3] == "  teacher: 天 地"
    assert all(line.isprintable() for line in lines)
