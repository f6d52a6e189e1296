"""Questions to an OpenAI-compatible endpoint (POST /chat/completions), with retries, from any number of threads.

The key comes from the environment and appears nowhere else: it is taken out of whatever the server says, and redirects
are not followed, so that no other host gets it. Errors carry what came; the tools make their sentences of it.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import urllib3
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from verl.utils.console import shorten

API_KEY = "OPENAI_API_KEY"
PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on
LONGEST_WAIT = 60.0  # seconds, of our own choice
LONGEST_ASKED_WAIT = 3600.0  # seconds, where the server asks for it
SHOWN_CHARACTERS = 200
# Of a secret. Local servers are given words such as EMPTY, which answers may well have in them.
SHORTEST_KEY = 12
# Of 429s that do not pass.
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")


_HALVES = re.compile("[\ud800-\udfff]")


class EndpointError(ValueError):
    """The endpoint cannot be used as it is: what was expected, what came, what to do."""


class NotAccepted(EndpointError):
    """A request that the server refuses, as it would again. `said` is its words, shortened; `code` its own name for
    it, "" if it has none; `location` where a redirect points to."""

    def __init__(self, status: int, said: str, code: str = "", location: str = ""):
        super().__init__(f"HTTP {status}: {said}")
        self.status, self.said, self.code, self.location = status, said, code, location


class NoCompletion(EndpointError):
    """A reply that is no chat completion; its beginning."""


class NoAnswer(EndpointError):
    """No answer after all `tries`; the last trouble."""

    def __init__(self, trouble: str, tries: int):
        super().__init__(trouble)
        self.tries = tries


class Stopped(Exception):
    """The client has been told to stop before the request was sent."""


class _Passing(Exception):
    """A trouble that may pass, the seconds that the server asks to wait, and whether somebody spoke HTTP there, or may
    yet."""

    def __init__(self, trouble: str, wait: float = 0.0, spoke: bool = True):
        super().__init__(trouble)
        self.wait, self.spoke = wait, spoke


@dataclass(frozen=True)
class Reply:
    """A chat completion. `text` and numbers of tokens are None where there are none, other texts ""."""

    text: str | None
    reasoning: str = ""
    refusal: str = ""
    finish_reason: str = ""
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# When requests start


class Pace:
    """When the next request may start: so many requests and tokens a minute over all threads, evenly spread.

    A minute of any beginning never sees more requests than allowed, retries included. Tokens are those expected of a
    request when it starts, set right when its answer has come.
    """

    def __init__(self, requests: float | None = None, tokens: float | None = None):
        self.stop = threading.Event()
        self._request = 60 / requests if requests else 0.0  # seconds
        self._token = 60 / tokens if tokens else 0.0
        self._next_request = self._next_token = self._held = float("-inf")
        self._lock = threading.Lock()

    def start(self, tokens: int) -> None:
        """Return when it is the caller's turn; Stopped if nothing is to start any more."""
        while True:
            with self._lock:
                now = time.monotonic()
                turn = max(self._next_request, self._next_token, self._held)
                if turn <= now and not self.stop.is_set():
                    self._next_request = now + self._request
                    self._next_token = now + tokens * self._token
                    return
            self.sleep(turn - now)

    def sleep(self, seconds: float) -> None:
        """Wait so long; Stopped as soon as nothing is to start any more."""
        if self.stop.wait(max(0.0, seconds)):
            raise Stopped

    def hold(self, seconds: float) -> None:
        """Let nobody start for so long."""
        with self._lock:
            self._held = max(self._held, time.monotonic() + seconds)

    def settle(self, tokens: int) -> None:
        """Count so many tokens more than were expected of a request, or fewer."""
        with self._lock:
            self._next_token += tokens * self._token


# ---------------------------------------------------------------------------------------------------------------------
# The client


@dataclass(frozen=True)
class ChatClient:
    """`url` ends before /chat/completions; `timeout`, seconds for a whole answer; `retries` after the first try;
    `backoff`, seconds before the first of these, twice as long before each further one; `connections` kept open;
    `key_name` of the environment's variable. With `retries_malformed`, what is no completion is a trouble that may
    pass."""

    url: str
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    connections: int = 8
    key_name: str = API_KEY
    retries_malformed: bool = False
    pace: Pace = field(default_factory=Pace)

    def check(self) -> None:
        """See whether something answers HTTP at `url`.

        Raises:
            NotAccepted: it refuses the key (401 or 403).
            NoAnswer: nothing does.
        """
        try:
            self._send("GET", "/models", None)
        except NotAccepted as error:
            if error.status in (401, 403):
                raise
        except _Passing as error:
            if not error.spoke:
                raise NoAnswer(str(error), 1) from None

    def ask(self, body: dict[str, Any], tokens: int = 0) -> Reply:
        """The answer to a request, of which so many tokens are expected, both ways.

        Tries again after 408, 409, 425, 429, 5xx, timeouts and broken connections, waiting twice as long each time, or
        as long as the server says, if that is longer; after 429, so does every thread.

        Raises:
            NotAccepted: any other status.
            NoAnswer: there is none after all tries.
            NoCompletion: the reply is none, or, with `retries_malformed`, all of them.
            Stopped: before it was sent, or between two tries.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((_Passing, NoCompletion) if self.retries_malformed else _Passing),
            stop=stop_after_attempt(self.retries + 1),
            wait=self._wait,
            sleep=self.pace.sleep,
            reraise=True,
        )
        try:
            return retrying(self._try, body, tokens)
        except _Passing as error:
            raise NoAnswer(str(error), self.retries + 1) from None

    def _try(self, body: dict[str, Any], tokens: int) -> Reply:
        self.pace.start(tokens)
        reply = read_reply(self._send("POST", "/chat/completions", body))
        used = [reply.prompt_tokens, reply.completion_tokens]
        if None not in used:
            self.pace.settle(sum(used) - tokens)
        return reply

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> str:
        """The reply's text, without the key."""
        headers = {"Content-Type": "application/json"}
        if key := self._key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + self.timeout
        try:
            response = self._pool.request(
                method,
                self.url.rstrip("/") + path,
                body=data,
                headers=headers,
                timeout=urllib3.Timeout(connect=min(self.timeout, 30.0), read=self.timeout),
                redirect=False,
                retries=False,
                preload_content=False,
            )
            text = self._without_key(self._read(response, until))
        except (OSError, urllib3.exceptions.HTTPError) as error:
            slow = isinstance(error, TimeoutError | urllib3.exceptions.ReadTimeoutError)
            raise _Passing(self._clean(error), spoke=slow) from None
        if response.status < 300:
            return text
        raise self._refusal(response, text)

    def _read(self, response: urllib3.BaseHTTPResponse, until: float) -> str:
        """All of the body; a server that sends blanks to keep a connection open does not keep us for ever."""
        parts = []
        try:
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > until:
                    raise TimeoutError(f"an answer that was not whole after {self.timeout:g} s")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return b"".join(parts).decode(errors="replace")

    def _refusal(self, response: urllib3.BaseHTTPResponse, text: str) -> Exception:
        said, code = shorten(text, SHOWN_CHARACTERS) or "nothing", ""
        with suppress(ValueError, TypeError, AttributeError):
            code = json.loads(text)["error"].get("code") or ""
        passing = (response.status in PASSING or response.status >= 500) and code not in NO_CREDIT
        if not passing:
            location = self._clean(response.headers.get("Location", ""))
            return NotAccepted(response.status, said, str(code), location)
        asked = _seconds(response.headers.get("Retry-After"))
        if response.status == 429:
            self.pace.hold(asked)
        return _Passing(f"HTTP {response.status}: {said}", asked)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds; a random share keeps threads from coming back together."""
        own = wait_exponential(self.backoff, LONGEST_WAIT)(state) + wait_random(0, self.backoff / 2)(state)
        error = state.outcome.exception()
        return max(own, error.wait if isinstance(error, _Passing) else 0.0)

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        scheme, host = urlsplit(self.url)[:2]
        proxy = urllib.request.getproxies().get(scheme)
        if proxy and not urllib.request.proxy_bypass(host):
            return urllib3.ProxyManager(proxy, num_pools=2, maxsize=self.connections)
        return urllib3.PoolManager(num_pools=2, maxsize=self.connections)

    @property
    def _key(self) -> str:
        """EndpointError for a key that no header can have; its text is not in the error."""
        key = os.environ.get(self.key_name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(
                f"{self.key_name}: expected a key of letters, digits and signs of ASCII, got others in it; set it again"
            )
        return key

    def _without_key(self, text: str) -> str:
        """Nor as JSON may write it: some servers escape the / and + of base64."""
        if len(self._key) < SHORTEST_KEY:
            return text
        signs = (rf"(?:\\?{re.escape(sign)}|\\u(?i:{ord(sign):04x}))" for sign in self._key)
        return re.sub("".join(signs), "***", text)

    def _clean(self, value: object) -> str:
        """Printable, on one line, short, without the key."""
        return shorten(self._without_key(str(value)), SHOWN_CHARACTERS) or "nothing"


def _seconds(asked: str | None) -> float:
    """Of a Retry-After, which is a number of seconds or a date."""
    if not asked:
        return 0.0
    try:
        return min(float(asked), LONGEST_ASKED_WAIT) if float(asked) > 0 else 0.0
    except ValueError:
        with suppress(urllib3.exceptions.InvalidHeader):
            return min(urllib3.Retry().parse_retry_after(asked), LONGEST_ASKED_WAIT)
        return 0.0


def _joined(content: Any) -> Any:
    """A message's text, also where it comes in parts."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def read_reply(raw: str) -> Reply:
    """A chat completion from its JSON.

    Raises:
        NoCompletion: it is none.
        _Passing, NotAccepted: it is an error that came with status 200, as routers send them.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and isinstance(data.get("error"), dict) and not data.get("choices"):
        status, said = data["error"].get("code"), shorten(raw, SHOWN_CHARACTERS)
        if isinstance(status, int) and 400 <= status < 500 and status not in PASSING:
            raise NotAccepted(status, said)
        raise _Passing(f"an error with status 200: {said}")
    try:
        choice = data["choices"][0]
        message, usage = choice["message"], data.get("usage") or {}
        texts = [_joined(message.get("content")), message.get("reasoning_content") or message.get("reasoning")]
        texts += [message.get("refusal"), choice.get("finish_reason"), data.get("model")]
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        found = "content" in message or any(texts[:3])
    except (KeyError, IndexError, TypeError, AttributeError):
        texts, counts, found = [], [], False
    if not found or not all(text is None or isinstance(text, str) for text in texts):
        raise NoCompletion(shorten(raw, SHOWN_CHARACTERS) or "nothing")
    # Halves of surrogate pairs are no text, and no file in UTF-8 can have them.
    sound = [_HALVES.sub("\ufffd", text or "") for text in texts]
    sound[0] = None if texts[0] is None else sound[0]
    return Reply(*sound, *(count if isinstance(count, int) and count >= 0 else None for count in counts))
