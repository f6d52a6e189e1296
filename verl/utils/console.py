"""Text for a terminal that may not have its characters, and that would obey some of them."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from types import TracebackType

# Control characters, which set titles and colours, move the cursor or ask the terminal for an answer, all but the tab
# and the end of a line; and those that turn the direction of what follows.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text as lines that a terminal shows and does not obey, whatever data it comes from.

    With a question mark for every character that standard output's encoding lacks (an old terminal, a pipe in ASCII),
    which would otherwise end the program.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = _OBEYED.sub("\ufffd", text.replace("\r\n", "\n"))
    return shown.encode(encoding, errors="replace").decode(encoding)


class PrintableFormatter(logging.Formatter):
    """A log's lines, tracebacks included, as `printable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def print_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """For `sys.excepthook`: messages of errors have data in them."""
    print(printable("".join(traceback.format_exception(kind, error, where))), file=sys.stderr, end="")


def shorten(text: str, characters: int = 160) -> str:
    """On one line, at most so many characters, without any that a terminal would obey."""
    line = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    return line if len(line) <= characters else line[:characters] + "..."
