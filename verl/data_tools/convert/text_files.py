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
    fits = None if encoding or found != "utf-8" else _utf_16(data)
    if fits is None:
        try:
            return Text(data.decode(found), found)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            fault = f"is not {found} text (line {line}, byte 0x{data[error.start]:02x})"
            fits = _encoding_that_fits(data)
            if fits == found:
                fits = None
    else:
        fault = "is not UTF-8 text (half of its bytes are zero)"
    way_out = f"it reads as {fits}: pass --encoding {fits}" if fits else "pass its --encoding, or save it as UTF-8"
    raise ValueError(f"{path} {fault}; {way_out}")


def check_encoding(name: str) -> str:
    """The name, for a flag; ValueError if Python knows no such encoding of text."""
    if not codecs.lookup(name)._is_text_encoding:
        raise ValueError(f"{name} is no encoding of text")
    return name


def _utf_16(data: bytes) -> str | None:
    """UTF-16 without a mark, told by the zeros in every other byte of Latin letters and line ends, or None."""
    start = data[:_LOOKED_AT]
    even, odd = start[::2], start[1::2]
    if odd and even.count(0) > 0.5 * len(even):
        return "utf-16-be"
    return "utf-16-le" if odd and odd.count(0) > 0.5 * len(odd) else None


def _encoding_that_fits(data: bytes) -> str | None:
    """The encoding of Chinese or of western European Windows, whichever makes plausible letters of it, or None."""
    for name, plausible in (("gb18030", _is_chinese), ("big5", _is_chinese), ("cp1252", str.isprintable)):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        other = "".join(character for character in text if not character.isascii())
        if plausible(other):
            return name
    return None


def _is_chinese(text: str) -> bool:
    """Mostly characters of the first 6,763 of Chinese encodings, and their punctuation: chance would reach further."""
    common = 0
    for character in text:
        code = character.encode("gb2312", errors="ignore")
        common += bool(code) and (0xB0 <= code[0] <= 0xF7 or character in "，。：；！？“”‘’、（）《》…—·")
    return common > 0.8 * len(text)
