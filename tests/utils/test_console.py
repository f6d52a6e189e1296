"""What a terminal without a text's characters shows."""

from __future__ import annotations

import io
import sys

import pytest

from verl.utils.console import printable


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
