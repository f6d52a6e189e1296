"""Answers that are no answers: cut off, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from verl.data_tools.check.findings import Finding, Sample

# Columns that say why a teacher stopped, and what they say when it was made to.
FINISH_COLUMNS = ("finish_reason", "stop_reason", "finish")
CUT_REASONS = frozenset(
    {"length", "max_tokens", "max_output_tokens", "max_length", "model_length", "model_context_window_exceeded"}
)
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
    refusal = refuses(answer)
    if refusal:
        yield Finding("refused", number, refusal, answer)


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


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

_SORRY = (
    r"(?:(?:i(?:['’]m| am) (?:\w+ )?sorry|sorry|(?:my )?apologies|i apologi[sz]e|unfortunately)\b"
    r"[^.!?\n]{0,40}[,.!;:]?\s*(?:but\s+|however,?\s+)?)"
)
_AS_AI = r"(?:as an? (?:\w+ ){0,3}(?:ai|language model|artificial intelligence|assistant)\b[^.!?\n]{0,60}?,?\s*)"
_CANNOT = (
    r"i(?:['’]m| am)? (?:(?:can(?:no|['’])t|can not|cannot|could(?:n['’]t| not)|won['’]t|will not)|"
    r"(?:unable|not able|not allowed|not permitted|not programmed) to|"
    r"(?:do not|don['’]t) have (?:the (?:ability|capability|capacity)|access)|must (?:decline|refuse))"
)
_HELP = (
    r"(?: \w+)? (?:help|assist|comply|fulfil|fulfill|provide|create|generate|write|produce|support|engage|participate|"
    r"discuss|share|answer|access|browse|open|see|view|do that|do this|continue|complete|respond|offer|give)\b"
)
_ENGLISH = re.compile(
    rf"(?:{_SORRY}(?:{_AS_AI})?{_CANNOT}|{_AS_AI}{_CANNOT}|{_CANNOT}{_HELP}|i must (?:decline|refuse))", re.IGNORECASE
)
_APOLOGY_ZH = r"(?:我?[很非十]?[常分]?(?:抱歉|遗憾|遺憾)|对不起|對不起|不好意思|请原谅|請原諒)"
_AS_AI_ZH = (
    r"作[为為](?:[一1]?[个個名])?[^，,。！\n]{0,12}"
    r"(?:AI|人工智能|人工智慧|模型|助手|程序|机器人|機器人)[^，,。！\n]{0,10}"
)
_CANNOT_ZH = r"(?:不能|无法|無法|没办法|沒辦法|没有办法|没法|不可以|不具备|不具備|没有能力|沒有能力|不会提供|不便)"
_DO_ZH = (
    r"(?:帮|幫|提供|协助|協助|满足|滿足|回答|完成|生成|访问|訪問|浏览|瀏覽|处理|處理|查看|执行|執行|讨论|討論|支持)"
)
_CHINESE = re.compile(
    rf"(?:{_APOLOGY_ZH}[^。！？\n]{{0,40}}?{_CANNOT_ZH}|{_AS_AI_ZH}[，,]?[^。！？\n]{{0,30}}?{_CANNOT_ZH}|"
    rf"我{_CANNOT_ZH}(?:为您|为你|給您|给您|给你|直接)?{_DO_ZH})",
    re.IGNORECASE,
)


def refuses(text: str) -> str | None:
    """In which words an answer begins that refuses ("in English", "in Chinese"), or None."""
    start = text.lstrip(" \t\r\n\"'“*")[:300]
    if _ENGLISH.match(start):
        return "it begins as English refusals do"
    return "it begins as Chinese refusals do" if _CHINESE.match(start) else None
