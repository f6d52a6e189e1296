"""What is said of answers that are not to be learned from: refusals, in English and Chinese, and answers cut off."""

from __future__ import annotations

import re

# What servers say of an answer that had no more tokens.
CUT_REASONS = frozenset(
    {"length", "max_tokens", "max_output_tokens", "max_length", "model_length", "model_context_window_exceeded"}
)

# Characters of an answer's beginning: further on, a refusal is a remark.
_BEGINNING = 300
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
_DO = (
    r"(?:help|assist|comply|fulfil|fulfill|provide|create|generate|write|produce|support|engage|participate|"
    r"discuss|share|answer|access|browse|open|see|view|do that|do this|continue|complete|respond|offer|give)\b"
)
_HELP = rf"(?: \w+)? {_DO}"
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
    r"(?:帮|幫|提供|给出|給出|协助|協助|满足|滿足|"
    r"回答|完成|生成|访问|訪問|浏览|瀏覽|处理|處理|查看|执行|執行|讨论|討論|支持)"
)  # fmt: skip
_CHINESE = re.compile(
    rf"(?:{_APOLOGY_ZH}[^。！？\n]{{0,40}}?{_CANNOT_ZH}|{_AS_AI_ZH}[，,]?[^。！？\n]{{0,30}}?{_CANNOT_ZH}|"
    rf"我{_CANNOT_ZH}(?:为您|为你|給您|给您|给你|直接)?{_DO_ZH})",
    re.IGNORECASE,
)
# What is refused, in the same sentence.
_REFUSED = re.compile(rf"{_CANNOT}\b[^.!?\n]{{0,30}}?\b{_DO}|{_CANNOT_ZH}[^。！？\n]{{0,16}}?{_DO_ZH}", re.IGNORECASE)


def refuses(text: str) -> str | None:
    """The language in which an answer begins as refusals do, or None. What follows may be of use all the same."""
    start = _beginning(text)
    if _ENGLISH.match(start):
        return "English"
    return "Chinese" if _CHINESE.match(start) else None


def refuses_to_help(text: str) -> bool:
    """Whether an answer that begins as refusals do says so of a task: to provide, to write, to answer."""
    start = _beginning(text)
    match = _ENGLISH.match(start) or _CHINESE.match(start)
    return match is not None and _REFUSED.search(start[: match.end() + 60]) is not None


def _beginning(text: str) -> str:
    return text.lstrip(" \t\r\n\"'“*")[:_BEGINNING]
