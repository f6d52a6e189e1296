"""Text for a terminal that may not have its characters, and that would obey some of them."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
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


def say(text: str) -> None:
    """Print it, printable. Whoever reads standard output may stop before its end, as `| head` does: that is no error,
    and nothing more is shown."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        nobody_reads()


def nobody_reads() -> None:
    """Let nothing more come out of standard output: what is still in the buffer is written once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class PrintableFormatter(logging.Formatter):
    """A log's lines, tracebacks included, as `printable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def print_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """For `sys.excepthook`: messages of errors have data in them."""
    print(printable("".join(traceback.format_exception(kind, error, where))), file=sys.stderr, end="")


def shorten(text: str, characters: int = 160) -> str:
    """On one line, at most so many characters, without any that a terminal would obey."""
    line = _on_one_line(text)
    return line if len(line) <= characters else line[:characters] + "..."


def wrapped(text: str, columns: int, lines: int) -> list[str]:
    """The text on at most so many lines of so many terminal columns, 4 at least, without any character that a terminal
    would obey.

    Lines break at spaces and beside characters of double width; within a word only where it is longer than a line. A
    text that does not fit ends in "...".
    """
    # A character takes a column or two, but for marks on others, of which text has few.
    shown = _on_one_line(text[: 4 * columns * lines])
    rows = [""]
    for piece in _pieces(shown, columns):
        if width(rows[-1]) + width(piece) > columns:
            rows.append("")
        if rows[-1] or piece != " ":
            rows[-1] += piece
    if len(rows) > lines:
        rows = rows[:lines]
        while width(rows[-1]) > columns - 3:
            rows[-1] = rows[-1][:-1]
        rows[-1] += "..."
    return [row.rstrip() for row in rows]


def width(text: str) -> int:
    """Terminal columns that the text takes: two for a character of double width, none for a mark on another one."""
    return sum(map(_width, text))


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of cells, the first `left` of them to the left and the others to the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
        cells = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _pieces(line: str, columns: int) -> Iterator[str]:
    """What a line may break between: spaces, characters of double width, and what lies between those, in parts of at
    most so many columns."""
    piece = ""
    for character in line:
        alone = character == " " or _width(character) == 2
        if piece and (alone or width(piece + character) > columns):
            yield piece
            piece = ""
        if alone:
            yield character
        else:
            piece += character
    if piece:
        yield piece


def _on_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
