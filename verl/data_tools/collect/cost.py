"""Tokens and money: estimated before the first call, counted while answers come, and kept within a budget."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from verl.data_tools.collect.prompts import Messages, Request
from verl.tools.chat_client import Reply

Count = Callable[[Messages], int]
SAMPLE = 500  # prompts that are looked at for the estimate
ANSWER_TOKENS = 500  # of an answer, as long as none is known
TOKENS_PER_MESSAGE = 4
# By characters: about what common tokenizers make of English, and of Chinese, Japanese and Korean.
CHARACTERS_PER_TOKEN, TOKENS_PER_IDEOGRAPH = 4.0, 0.7
_IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")


def count_text(text: str) -> int:
    """Tokens of a text, by its characters."""
    ideographs = len(_IDEOGRAPHS.findall(text))
    return round(ideographs * TOKENS_PER_IDEOGRAPH + (len(text) - ideographs) / CHARACTERS_PER_TOKEN)


def count_by_characters(messages: Messages) -> int:
    """Tokens of a prompt, by its characters."""
    return sum(count_text(message["content"]) + TOKENS_PER_MESSAGE for message in messages)


def counter(tokenizer: str | None) -> Count:
    """What counts a prompt's tokens: a tokenizer's folder, or the characters."""
    if tokenizer is None:
        return count_by_characters
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer: expected a tokenizer's folder, got {tokenizer} ({error}); correct it") from None
    return lambda messages: sum(len(loaded(m["content"])["input_ids"]) + TOKENS_PER_MESSAGE for m in messages)


@dataclass(frozen=True)
class Prices:
    """Money per million tokens of prompts and of answers."""

    prompt: float
    answer: float

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float:
        return (prompt_tokens * self.prompt + answer_tokens * self.answer) / 1e6


@dataclass
class Account:
    """Tokens of all answers in a log, and what further ones may take.

    prices: None where they are unknown.
    budget: money; max_tokens: tokens both ways; None is no limit.
    longest: tokens of an answer at most, None is unknown; typical: those of one as long as none is there.
    """

    prices: Prices | None = None
    budget: float | None = None
    max_tokens: int | None = None
    longest: int | None = None
    typical: int = ANSWER_TOKENS
    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    uncounted: int = 0  # answers whose tokens the server did not say
    held: dict[str, tuple[int, int]] = field(default_factory=dict)  # of requests under way

    @property
    def answer_mean(self) -> float:
        """Tokens of an answer, as far as is known."""
        return self.answer_tokens / self.answers if self.answers else min(self.typical, self.longest or self.typical)

    @property
    def money(self) -> float | None:
        """That has been spent, where prices are known."""
        return self.prices and self.prices.cost(self.prompt_tokens, self.answer_tokens)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def fits(self, prompt_tokens: int) -> bool:
        """Whether one more answer stays within the limits, whatever those under way come to, as far as that is
        known."""
        answer = self.longest or round(self.answer_mean)
        asked = [*self.held.values(), (prompt_tokens, answer)]
        prompts, answers = self.prompt_tokens + sum(p for p, _ in asked), self.answer_tokens + sum(a for _, a in asked)
        if self.max_tokens is not None and prompts + answers > self.max_tokens:
            return False
        return self.budget is None or self.prices is None or self.prices.cost(prompts, answers) <= self.budget

    def hold(self, request: Request, prompt_tokens: int) -> None:
        """Count a request that is under way."""
        self.held[request.key] = (prompt_tokens, self.longest or round(self.answer_mean))

    def add(self, prompt_tokens: int, answer_tokens: int, estimated: bool) -> None:
        """Count an answer."""
        self.answers += 1
        self.uncounted += estimated
        self.prompt_tokens += prompt_tokens
        self.answer_tokens += answer_tokens


def usage_of(reply: Reply, prompt_tokens: int) -> dict[str, int | bool]:
    """Tokens of an answer: the server's numbers, or, where it gives none, ours."""
    said = reply.prompt_tokens is not None and reply.completion_tokens is not None
    if said:
        return {"prompt": reply.prompt_tokens, "answer": reply.completion_tokens, "estimated": False}
    answer = count_text((reply.text or "") + reply.reasoning + reply.refusal)
    return {"prompt": prompt_tokens, "answer": answer, "estimated": True}


def estimate(requests: Sequence[Request], count: Count, account: Account) -> str:
    """What the requests that are left will take, as text."""
    sample = random.Random(0).sample(requests, min(SAMPLE, len(requests)))
    prompts = round(mean(count(request.messages) for request in sample) * len(requests))
    answers = round(account.answer_mean * len(requests))
    how = f"{len(sample)} prompts looked at, {account.answer_mean:.0f} tokens an answer"
    text = f"estimate: {len(requests):,} answers, {prompts:,} + {answers:,} tokens ({how})"
    if account.prices:
        money = account.prices.cost(prompts, answers)
        text += f", {money:.2f} in money"
        if account.longest:
            text += f", {account.prices.cost(prompts, account.longest * len(requests)):.2f} at most"
        if account.budget is not None and account.money + money > account.budget:
            text += f"; --budget {account.budget:g}, of which {account.money:.2f} is spent, ends it before"
    return text
