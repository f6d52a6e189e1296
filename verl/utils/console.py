"""Text for a terminal: on one line, in the characters that it has."""

from __future__ import annotations

import sys


def one_line(text: str, characters: int) -> str:
    """The text on one line, cut to so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[:characters] + "..."


def printable(text: str) -> str:
    """The text with a question mark for every character that standard output's encoding lacks (an old terminal, a pipe
    in ASCII), which would otherwise end the program."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
