"""Requests to answers in the log: many at a time, in the limits of money, tokens, disk and the user's patience."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

from tqdm import tqdm

from verl.data_tools.collect.cost import Account, Count, usage_of
from verl.data_tools.collect.log import AnswerLog
from verl.data_tools.collect.prompts import Request
from verl.tools.chat_client import NO_CREDIT, ChatClient, NoAnswer, NoCompletion, NotAccepted, Reply, Stopped
from verl.utils.checkpoint.room import FULL
from verl.utils.signals import RunSignals

FIRST_LOOK = 8  # requests refused alike, or without an answer, after which an endpoint that gave none is given up
LOOK_EVERY_S = 0.2
SAY_EVERY_S = 60.0  # where no bar is seen
# Statuses of which every further request would get the same.
KEY_REFUSED = (401, 403)
NO_MONEY = (402, 429)
WRONG_PLACE = (404, 405)
# Refusals in a row that are taken for the prompts' own fault, once something was answered.
MANY = 32
_TOO_LONG = re.compile(r"context|too long|too_long|length", re.IGNORECASE)
# What servers say of a prompt that their filter stops.
_FILTERED = re.compile(r"content[_ ]?(?:filter|policy)|moderation|data_?inspection", re.IGNORECASE)

End = Literal["done", "limit", "signal", "full disk", "endpoint"]


@dataclass(frozen=True)
class Ending:
    """Why no more is asked, and a sentence on it."""

    why: End
    said: str = ""


@dataclass
class Tally:
    """What came of this run's requests."""

    answered: int = 0
    refused_for_good: int = 0  # logged, and not asked again
    unanswered: int = 0  # after all tries; asked again by the next run
    lost: int = 0  # answers that the full disk did not take
    last_trouble: str = ""


Outcome = Reply | NotAccepted | NoAnswer | NoCompletion | Stopped | BaseException


class Askers:
    """Threads that ask. They are daemons: a process that is told to end at once does not wait for answers."""

    def __init__(self, client: ChatClient, size: int):
        self._todo: SimpleQueue[tuple[Request, int] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Request, Outcome]] = SimpleQueue()
        self._client, self._size = client, size
        for _ in range(size):
            threading.Thread(target=self._work, daemon=True).start()

    def ask(self, request: Request, tokens: int) -> None:
        """Send a request, of which so many tokens are expected, as soon as a thread is free."""
        self._todo.put((request, tokens))

    def outcomes(self) -> list[tuple[Request, Outcome]]:
        """All that have come, after waiting a moment for the first."""
        found = []
        try:
            found.append(self._done.get(timeout=LOOK_EVERY_S))
            while True:
                found.append(self._done.get_nowait())
        except Empty:
            return found

    def dismiss(self) -> None:
        """Let the threads go."""
        for _ in range(self._size):
            self._todo.put(None)

    def _work(self) -> None:
        while task := self._todo.get():
            request, tokens = task
            try:
                self._done.put((request, self._client.ask(request.body, tokens)))
            except BaseException as error:
                self._done.put((request, error))


@dataclass
class Collecting:
    """One run over the requests that are missing."""

    client: ChatClient
    log: AnswerLog
    account: Account
    count: Count
    concurrency: int
    signals: RunSignals
    tally: Tally = field(default_factory=Tally)
    ending: Ending | None = None
    _flying: dict[str, int] = field(default_factory=dict)  # expected tokens of their prompts
    _unsure: list[dict[str, Any]] = field(default_factory=list)  # records of refusals since the last answer
    _in_a_row: int = 0
    _said: float = field(default_factory=time.monotonic)

    def run(self, requests: Sequence[Request]) -> Ending:
        """Ask until all are answered or something ends it; every answer that comes is in the log."""
        waiting = deque(requests)
        if requests:
            self._check()
        askers = Askers(self.client, min(self.concurrency, len(requests)))
        with tqdm(total=len(requests), desc="answers", unit="", disable=None, dynamic_ncols=True) as bar:
            while True:
                if self.signals.received:
                    self._end("signal")
                self._start(waiting, askers)
                if not self._flying:
                    break
                came = askers.outcomes()
                self._take(came)
                bar.update(len(came))
                self._say(bar, len(requests))
        askers.dismiss()
        if self._unsure and self.ending is None:
            if self.account.answers:
                self._keep(self._unsure)
            else:
                self._end("endpoint", self._refused_all())
        return self.ending or Ending("done")

    def _check(self) -> None:
        """End before anything is asked where nothing answers, or the key is refused."""
        try:
            self.client.check()
        except NotAccepted as error:
            self._end("endpoint", self._advice(error))
        except NoAnswer as error:
            self._end(
                "endpoint",
                f"--endpoint: expected an OpenAI-compatible endpoint at {self.client.url}, got {error}; start the "
                "server, or correct the URL (it usually ends in /v1)",
            )

    def _start(self, waiting: deque[Request], askers: Askers) -> None:
        while waiting and self.ending is None and len(self._flying) < self.concurrency:
            request = waiting[0]
            tokens = self.count(request.messages)
            if not self.account.fits(tokens):
                if not self._flying:
                    self._end("limit", f"one more answer might exceed the limit, {len(waiting):,} are left")
                return
            self.account.hold(waiting.popleft(), tokens)
            self._flying[request.key] = tokens
            askers.ask(request, tokens + round(self.account.answer_mean))

    def _take(self, came: Sequence[tuple[Request, Outcome]]) -> None:
        """Keep what came, then count it."""
        records = []
        for request, outcome in came:
            tokens = self._flying.pop(request.key)
            self.account.held.pop(request.key)
            if isinstance(outcome, Reply):
                records += [*self._unsure, answer_record(request, outcome, tokens)]
                self._unsure, self._in_a_row = [], 0
            elif isinstance(outcome, NotAccepted):
                records += self._refused(request, outcome)
            elif isinstance(outcome, NoAnswer | NoCompletion):
                self._unanswered(outcome)
            elif not isinstance(outcome, Stopped):
                raise outcome
        if records:
            self._keep(records)

    def _keep(self, records: list[dict[str, Any]]) -> None:
        try:
            self.log.append(records)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.tally.lost += len(records)
        else:
            for record in records:
                if "error" in record:
                    self.tally.refused_for_good += 1
                else:
                    self.tally.answered += 1
                    self.account.add(*record["usage"].values())
        if self.log.full:
            self._end("full disk", f"no room is left on the disk of {self.log.path.parent}")

    def _refused(self, request: Request, error: NotAccepted) -> list[dict[str, Any]]:
        """What is to be logged of it now."""
        filtered = bool(_FILTERED.search(f"{error.code} {error.said}"))
        record = error_record(request, error, filtered)
        if filtered and error.status in (400, 403):
            return [record]
        if error.status in (*KEY_REFUSED, *NO_MONEY, *WRONG_PLACE) or error.status < 400:
            self._end("endpoint", self._advice(error))
            return []
        if self.account.answers and _TOO_LONG.search(f"{error.code} {error.said}"):
            return [record]
        # It may be the settings, or the server, which the next answer shows.
        self._unsure.append(record)
        if len(self._unsure) >= (max(MANY, 2 * self.concurrency) if self.account.answers else FIRST_LOOK):
            self._end("endpoint", self._refused_all())
        return []

    def _unanswered(self, error: NoAnswer | NoCompletion) -> None:
        self._in_a_row += 1
        self.tally.unanswered += 1
        self.tally.last_trouble = str(error)
        if self._in_a_row >= max(FIRST_LOOK, self.concurrency):
            self._end(
                "endpoint",
                f"--endpoint: expected answers from {self.client.url}, got none to {self._in_a_row} requests in a row, "
                f"each after {self.client.retries + 1} tries; the last: {error}; see to it that it is up, or raise "
                "--timeout",
            )

    def _end(self, why: End, said: str = "") -> None:
        """Ask no more; those under way are waited for."""
        if self.ending is None:
            self.ending = Ending(why, said)
            self.client.pace.stop.set()

    def _advice(self, error: NotAccepted) -> str:
        key = self.client.key_name
        fix = "correct the URL (it usually ends in /v1) or --model"
        if error.status in KEY_REFUSED:
            fix = f"set {key} in the environment to a key that may use the model"
        elif error.status in NO_MONEY or error.code in NO_CREDIT:
            fix = f"the account of the key in {key} has no credit left"
        elif error.status < 400:
            fix = f"redirects are not followed; pass {error.location or 'its target'}"
        return f"--endpoint: expected answers from {self.client.url}, got {error}; {fix}"

    def _refused_all(self) -> str:
        said = self._unsure[0]["error"]
        return (
            f"--endpoint: expected answers from {self.client.url}, got refusals of {len(self._unsure)} requests in "
            f"a row, with HTTP {said['status']}: {said['said']}; correct --model, the sampling settings or "
            "--extra_body, or the prompts"
        )

    def _say(self, bar: tqdm, total: int) -> None:
        account = self.account
        money = f", {account.money:.2f} in money" if account.prices else ""
        bar.set_postfix_str(f"{account.tokens:,} tokens{money}", refresh=False)
        if bar.disable and time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            tqdm.write(
                f"{self.tally.answered:,} of {total:,} answers, {account.tokens:,} tokens{money}", file=sys.stderr
            )


def answer_record(request: Request, reply: Reply, prompt_tokens: int) -> dict[str, Any]:
    """A line of the log for an answer, as it came."""
    return {
        "key": request.key,
        "number": request.number,
        "messages": request.messages,
        "answer": reply.text,
        "reasoning": reply.reasoning,
        "refusal": reply.refusal,
        "finish_reason": reply.finish_reason,
        "model": reply.model,
        "usage": usage_of(reply, prompt_tokens),
    }


def error_record(request: Request, error: NotAccepted, filtered: bool) -> dict[str, Any]:
    """A line of the log for a request that would be refused again."""
    said = {"status": error.status, "said": error.said, "filtered": filtered}
    return {"key": request.key, "number": request.number, "messages": request.messages, "error": said}
