"""One question to an OpenAI-compatible endpoint (POST /chat/completions), over plain HTTP, with retries.

The key comes from the environment (OPENAI_API_KEY) and appears nowhere else: it is taken out of whatever the server
says, and redirects are not followed, so that no other host gets it.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from verl.utils.console import shorten

API_KEY = "OPENAI_API_KEY"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_WAIT = 60.0  # seconds
SHOWN_CHARACTERS = 200


class EndpointError(ValueError):
    """The endpoint cannot be used as it is: what was expected, what came, what to do."""


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None makes a redirect an error."""


_OPENER = urllib.request.build_opener(_StayHere)


@dataclass(frozen=True)
class Endpoint:
    """Where questions go. `url` ends before /chat/completions; `options` go into every request, null takes one out;
    `timeout` in seconds per request; `retries` after the first try; `backoff`, seconds before the first of these."""

    url: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request: all that the answer depends on but the place it is sent to."""
        body = {"model": self.model, "messages": messages, "temperature": 0} | self.options
        return {key: value for key, value in body.items() if value is not None}

    def check(self) -> None:
        """EndpointError unless something answers HTTP at `url`, and does not refuse the key."""
        try:
            self._send("/models", None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EndpointError(
                f"--endpoint: expected an OpenAI-compatible endpoint at {self.url}, got {_clean(error)}; start the "
                "server, or correct the URL (it usually ends in /v1)"
            ) from None

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The reply's text.

        Tries again after 429, 5xx, timeouts and broken connections, waiting twice as long each time, or as long as the
        server says.

        Raises:
            EndpointError: it refuses, it does not answer after all retries, or what it answers is no chat completion.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._text_of(self._send("/chat/completions", self.body(messages)))
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN:
                    raise self._refused(error) from None
                trouble, wait = f"HTTP {error.code}: {_clean(_body(error))}", error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                trouble, wait = _clean(error), None
            if attempt < self.retries:
                time.sleep(self._wait(attempt, wait))
        raise EndpointError(
            f"--endpoint: expected an answer from {self.url} within {self.timeout:g} s, got {trouble} after "
            f"{self.retries + 1} tries; verdicts so far are kept: run again when it is up, lower --concurrency, or "
            "raise --timeout"
        )

    def _send(self, path: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data=data, headers=headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()

    def _text_of(self, raw: bytes) -> str:
        try:
            text = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            got = _clean(raw.decode(errors="replace"))
            raise EndpointError(
                f"--endpoint: expected a chat completion (choices[0].message.content) from {self.url}, got {got}; "
                "correct the URL, or the model's own limits (a reply of reasoning only has no content)"
            )
        return _without_key(text)

    def _refused(self, error: urllib.error.HTTPError) -> EndpointError:
        fix = {
            401: f"set {API_KEY} in the environment",
            403: f"set {API_KEY} in the environment to a key that may use the model",
            404: "correct the URL (it usually ends in /v1) or --endpoint_model",
        }.get(error.code, "correct --endpoint, --endpoint_model or --endpoint_options")
        if 300 <= error.code < 400:
            fix = f"redirects are not followed; pass {_clean(error.headers.get('Location', 'its target'))}"
        return EndpointError(
            f"--endpoint: expected an answer from {self.url}, got HTTP {error.code}: {_clean(_body(error))}; {fix}"
        )

    def _wait(self, attempt: int, asked: str | None) -> float:
        """Seconds; a random share keeps threads from coming back together."""
        own = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
        with suppress(ValueError):  # A date; our own wait will do.
            own = max(own, float(asked or 0))
        return min(own, LONGEST_WAIT)


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _without_key(text: str) -> str:
    key = os.environ.get(API_KEY)
    return text.replace(key, "***") if key else text


def _clean(value: object) -> str:
    """Printable, on one line, short, without the key."""
    return shorten(_without_key(str(value)), SHOWN_CHARACTERS) or "nothing"
