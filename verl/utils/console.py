"""Text for a terminal that may not have its characters."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """The text with a question mark for every character that standard output's encoding lacks (an old terminal, a pipe
    in ASCII), which would otherwise end the program."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def shorten(text: str, characters: int = 160) -> str:
    """On one line, at most so many characters, without any that a terminal would obey."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= characters else line[:characters] + "..."
