"""What a terminal without a text's characters shows."""

from __future__ import annotations

import io
import sys

import pytest

from verl.utils.console import printable, width, wrapped
from verl.utils.tracking import ConsoleBackend, Sample
from verl.utils.tracking.base import Run


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


def test_a_terminal_is_told_nothing_by_data(capsys, tmp_path):
    shown = printable(f"line\tone\r\nline two {OBEYED}\n")
    assert shown == "line\tone\nline two \ufffd]0;title\ufffd \ufffd[6n \ufffd2J \ufffdover \ufffddlrow\n"
    console = ConsoleBackend(Run("project", "experiment", {}, tmp_path, tmp_path))
    console.log_samples([Sample(OBEYED, f"a{OBEYED}", "天\n地", 0.5)], step=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step:3 - sample 1 of 1 - rouge-L 0.500" and lines[2] == "  teacher  天 地"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("text", "columns", "lines", "shown"),
    [
        ("one two three", 7, 3, ["one two", "three"]),
        ("one two three", 8, 3, ["one two", "three"]),
        ("a wonderful day", 6, 9, ["a", "wonder", "ful", "day"]),
        ("天地玄黄宇宙洪荒", 7, 3, ["天地玄", "黄宇宙", "洪荒"]),
        ("天地玄黄宇宙洪荒", 7, 2, ["天地玄", "黄宇..."]),
        ("abc天def地", 5, 3, ["abc天", "def地"]),
        ("12345678", 4, 2, ["1234", "5678"]),
        ("123456789", 4, 2, ["1234", "5..."]),
        ("e\u0301" * 5, 4, 2, ["e\u0301" * 4, "e\u0301"]),
        ("😀😀😀", 4, 2, ["😀😀", "😀"]),
        ("", 4, 2, [""]),
        (" \n\t", 4, 2, [""]),
        ("a\x1b[2Jb", 9, 1, ["a\ufffd[2Jb"]),
    ],
)
def test_texts_are_wrapped_by_what_they_take_on_a_terminal(text, columns, lines, shown):
    assert wrapped(text, columns, lines) == shown


def test_a_long_text_is_not_read_to_its_end():
    rows = wrapped("天地 earth " * 1_000_000, 60, 3)
    assert len(rows) == 3 and rows[-1].endswith("...") and all(50 < width(row) <= 60 for row in rows)
