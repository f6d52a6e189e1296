"""Answers that are no answers: cut off, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from verl.data_tools.answers import CUT_REASONS, refuses
from verl.data_tools.check.findings import Finding, Sample

# Columns that say why a teacher stopped.
FINISH_COLUMNS = ("finish_reason", "stop_reason", "finish")
# Code, behind a list's mark or a quotation's.
_FENCE = re.compile(r"^[\s>]*(?:(?:[-*+]|\d+[.)])\s+)?(?P<marks>`{3,}|~{3,})(?P<rest>.*)$")
# Fewer columns are a title, a name, a line of a poem.
_SENTENCE_COLUMNS = 30
_SENTENCE_END = re.compile(r"[.!?…。！？](?:[\"'”’)\]）」』*_]*)(?:\s|$|(?<=[。！？]))")
# A list's item, a heading, a row of a table, a picture's or a mail's last line: they end without a mark.
_NO_SENTENCE = re.compile(
    r"\s*(?:[-*+•·#|>]|\d+\s*[.)、]|[a-zA-Z][.)]|\(\w{1,3}\)|[（(][一二三四五六七八九十]+[）)]|[一二三四五六七八九十]+、)"
)
_CODE = re.compile(r"[{};=<>\\`|$]|\w\(|\)$|https?://|#\w|\s--?[a-z]")
# Who signs, or who said it.
_SIGNATURE = re.compile(
    r"\b(?:yours|sincerely|regards|respect|respectfully|love|wishes|luck|cheers|hope)\b|[\"”」』]\s*[-–—]|此致|敬上|祝好",
    re.IGNORECASE,
)
_WIDE = re.compile(r"[\u3000-\u9fff\uac00-\ud7af\uff00-\uffef]")
_OPEN_END = ",;:，、；：—-([{（「《“"


def findings_of_answer(number: int, sample: Sample) -> Iterator[Finding]:
    """Cut answers and refusals of a row."""
    answer = sample.answer
    cut = _cut(answer, sample.row.record)
    if cut:
        yield Finding("cut", number, cut, answer[-200:])
    elif without_end(answer):
        yield Finding("no_end", number, "no end of a sentence", answer[-200:])
    language = refuses(answer)
    if language:
        yield Finding("refused", number, f"it begins as {language} refusals do", answer)


# ---------------------------------------------------------------------------------------------------------------------
# Cut off


def _cut(answer: str, record: Mapping[str, Any]) -> str | None:
    for column in FINISH_COLUMNS:
        said = record.get(column)
        if isinstance(said, str) and said.strip().lower() in CUT_REASONS:
            return f"{column} is {said.strip().lower()}"
    return "a code block is not closed" if has_open_fence(answer) else None


def has_open_fence(text: str) -> bool:
    """Whether a block of code (``` or ~~~) that is opened is not closed, as Markdown counts."""
    opened = ""
    for line in text.splitlines():
        fence = _FENCE.match(line)
        if not opened:
            # Marks before and behind are code within a line.
            opened = fence["marks"] if fence and "`" not in fence["rest"] else ""
        elif (fence and fence["marks"].startswith(opened) and not fence["rest"].strip()) or (
            # What Markdown does not know and people write: the marks at the end of the last line.
            line.rstrip().endswith(opened) and not fence
        ):
            opened = ""
    return bool(opened)


def without_end(text: str) -> bool:
    """Whether prose stops within a sentence: what follows its last end of one is long, of no list and no code, and ends
    in a letter, a digit or a mark that goes on (a comma, an open bracket).

    Texts without any end of a sentence are not judged: names, numbers, poems.
    """
    text = text.rstrip()
    last = text.rpartition("\n")[2]
    if not text or text.startswith("#!") or _NO_SENTENCE.match(last) or not _SENTENCE_END.search(text):
        return False
    ends = [match.end() for match in _SENTENCE_END.finditer(last)]
    rest = last[ends[-1] :] if ends else last
    if len(rest) + len(_WIDE.findall(rest)) < _SENTENCE_COLUMNS or _CODE.search(rest) or _SIGNATURE.search(last[-80:]):
        return False
    return text[-1].isalnum() or text[-1] in _OPEN_END
