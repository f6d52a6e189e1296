"""What an answer is: one to learn from, refused, empty, or cut; and the thoughts in front of it."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

Kind = Literal["answered", "refused", "empty", "cut", "failed"]
APART: tuple[Kind, ...] = ("refused", "empty", "cut", "failed")
Reasoning = Literal["drop", "think"]

# What servers call the end of an answer that had no more tokens.
CUT = ("length", "max_tokens")
# A refusal shows at the beginning of an answer, or it is a remark in one.
LOOKED_AT = 160
_ENGLISH = r"""
    (?: ^ (?: (?: i['’]?m | i\s am ) \s (?: very \s | really \s | so \s )? sorry | sorry | i \s apologi[sz]e
            | unfortunately | my \s apologies ) \b [^.!?\n]{0,40}? \b
      | ^ (?: as \s an? \s (?: ai | artificial | large \s language ) [^.!?\n]{0,60}? , \s )? )
    i (?: \s (?: can\s?not | can['’]?t | won['’]?t | will \s not | must \s decline )
        | ['’]m \s (?: not \s able | unable ) | \s am \s (?: not \s able | unable ) ) \b [^.!?\n]{0,30}? \b
    (?: help | assist | comply | fulfil\w* | provide | answer | engage | support | participate | create | generate
      | write | discuss | continue | share | offer | give | do \s that | to \s (?: that | this ) )
"""
_CHINESE = r"""
    ^ (?: (?: 很 | 非常 | 十分 | 实在 | 真的 )? (?: 对不起 | 抱歉 | 不好意思 ) | 作为 [^，,。\n]{0,20} [，,] )
      [^。！？\n]{0,25}? (?: 无法 | 不能 | 不会 | 没有办法 | 没办法 | 不可以 | 不便 ) [^。！？\n]{0,16}?
      (?: 提供 | 回答 | 帮助 | 协助 | 帮 | 满足 | 完成 | 参与 | 讨论 | 支持 | 生成 | 给出 | 继续 | 处理 | 写 )
  | ^ 我 (?: 无法 | 不能 | 没有办法 | 没办法 ) [^。！？\n]{0,10}?
      (?: 提供 | 回答 | 协助 | 满足 | 参与 | 讨论 | 支持 | 帮 )
"""
_REFUSALS = [re.compile(pattern, re.IGNORECASE | re.VERBOSE) for pattern in (_ENGLISH, _CHINESE)]
# A thought at an answer's beginning, which a server left there; the template may have opened it already.
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)


class Answer(NamedTuple):
    """An answer without its thoughts, the thoughts ("" where there are none), and what it is."""

    text: str
    thought: str
    kind: Kind


def judge_answer(record: dict[str, Any]) -> Answer:
    """The answer in a line of the log."""
    if "error" in record:
        return Answer("", "", "refused" if record["error"]["filtered"] else "failed")
    text, thought = split_thought(record["answer"] or "")
    thought = record["reasoning"] or thought
    if record["finish_reason"] == "content_filter" or record["refusal"] or looks_refused(text):
        return Answer(text or record["refusal"], thought, "refused")
    if record["finish_reason"] in CUT:
        return Answer(text, thought, "cut")
    return Answer(text, thought, "answered" if text.strip() else "empty")


def looks_refused(text: str) -> bool:
    """Whether it begins as teachers refuse, in English or Chinese."""
    beginning = text.lstrip()[:LOOKED_AT]
    return any(pattern.search(beginning) for pattern in _REFUSALS)


def split_thought(text: str) -> tuple[str, str]:
    """An answer and the thought that stands in front of it, closed by </think>; an answer that never closes it has no
    text."""
    if match := _THOUGHT.match(text):
        return text[match.end() :], match[1].strip()
    if text.lstrip().startswith("<think>"):
        return "", text.lstrip().removeprefix("<think>").strip()
    return text, ""


def with_reasoning(answer: Answer, reasoning: Reasoning) -> str:
    """What the student is to learn: the answer, behind its thoughts where they are asked for."""
    if reasoning == "drop" or not answer.thought:
        return answer.text
    return f"<think>\n{answer.thought}\n</think>\n\n{answer.text}"
