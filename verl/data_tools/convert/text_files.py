"""Text out of files of any encoding; one that is not plain from the file is asked for, never guessed."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

# The longer ones first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Of a file without a mark: how many of its first bytes are looked at for the zeros of UTF-16.
_LOOKED_AT = 4096
# What files without a mark are in besides: of China, Taiwan, Japan, Korea, western and eastern Europe.
_OTHERS = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1252", "cp1251")
_SHOWN = 16


class Text(NamedTuple):
    """A file's text, and the encoding that it was read in."""

    text: str
    encoding: str


def read_text(path: Path, encoding: str | None) -> Text:
    """The text of a file, unpacked where it ends in .gz.

    Args:
        encoding: a name that Python knows; None is what the file's first bytes say, and UTF-8 where they say nothing.

    Raises:
        ValueError: it is not text in this encoding; names one that fits.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    found = encoding or next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    # A file that is all zeros and letters in turn would pass as UTF-8.
    zeros = None if encoding or found != "utf-8" else _utf_16(data)
    if zeros is not None:
        raise ValueError(f"{path} is not UTF-8 text (half of its bytes are zero); {_way_out(data, [zeros])}")
    try:
        return Text(data.decode(found), found)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = f"is not {found} text (line {line}, byte 0x{data[error.start]:02x})"
        fits = [name for name in _encodings_that_fit(data) if name != found]
        raise ValueError(f"{path} {fault}; {_way_out(data, fits)}") from error


def check_encoding(name: str) -> None:
    """LookupError if Python knows no such encoding of text."""
    "a".encode(name)


def _utf_16(data: bytes) -> str | None:
    """UTF-16 without a mark, told by the zeros in every other byte of Latin letters and line ends, or None."""
    start = data[:_LOOKED_AT]
    even, odd = start[::2], start[1::2]
    if odd and even.count(0) > 0.5 * len(even):
        return "utf-16-be"
    return "utf-16-le" if odd and odd.count(0) > 0.5 * len(odd) else None


def _encodings_that_fit(data: bytes) -> list[str]:
    """Encodings in which the bytes are text: of China alone if that is plausible, else all of a few."""
    texts = {}
    for name in _OTHERS:
        try:
            texts[name] = data.decode(name)
        except UnicodeDecodeError:
            continue
    if "gb18030" in texts and _is_chinese("".join(c for c in texts["gb18030"] if not c.isascii())):
        return ["gb18030"]
    return [name for name in texts if name != "gb18030"]


def _way_out(data: bytes, names: list[str]) -> str:
    """What to pass, with some of the text in each encoding: who reads it sees which one it is."""
    if not names:
        return "pass its --encoding, or save it as UTF-8"
    shown = [f"{name} ({_sample(data.decode(name))!r})" for name in names]
    if len(names) == 1:
        return f"it reads as {shown[0]}: pass --encoding {names[0]}"
    return f"it could be {', '.join(shown)}: pass the --encoding in which this is right"


def _sample(text: str) -> str:
    """From the first character on that is not ASCII, to the end of its line at most."""
    start = next((place for place, character in enumerate(text) if not character.isascii()), 0)
    return text[start : start + _SHOWN].partition("\n")[0]


def _is_chinese(text: str) -> bool:
    """Mostly characters of the first 6,763 of Chinese encodings, and their punctuation: chance would reach further."""
    common = 0
    for character in text:
        code = character.encode("gb2312", errors="ignore")
        common += bool(code) and (0xB0 <= code[0] <= 0xF7 or character in "，。：；！？“”‘’、（）《》…—·")
    return common > 0.8 * len(text)
