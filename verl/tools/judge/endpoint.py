"""One question to an OpenAI-compatible endpoint (`verl/tools/chat_client.py`), in the judge's words."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from verl.tools.chat_client import API_KEY, ChatClient, EndpointError, NoAnswer, NoCompletion, NotAccepted

__all__ = ["API_KEY", "Endpoint", "EndpointError"]


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
            self._client.check()
        except NotAccepted as error:
            raise self._refused(error) from None
        except (NoAnswer, ValueError) as error:
            raise EndpointError(
                f"--endpoint: expected an OpenAI-compatible endpoint at {self.url}, got {error}; start the server, or "
                "correct the URL (it usually ends in /v1)"
            ) from None

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The reply's text.

        Raises:
            EndpointError: it refuses, it does not answer after all retries, or what it answers is no chat completion.
        """
        try:
            reply = self._client.ask(self.body(messages))
            if reply.text is None:
                raise NoCompletion("a reply without text")
            return reply.text
        except NotAccepted as error:
            raise self._refused(error) from None
        except NoAnswer as error:
            raise EndpointError(
                f"--endpoint: expected an answer from {self.url} within {self.timeout:g} s, got {error} after "
                f"{error.tries} tries; verdicts so far are kept: run again when it is up, lower --concurrency, or "
                "raise --timeout"
            ) from None
        except NoCompletion as error:
            raise EndpointError(
                f"--endpoint: expected a chat completion (choices[0].message.content) from {self.url}, got {error}; "
                "correct the URL, or the model's own limits (a reply of reasoning only has no content)"
            ) from None

    @cached_property
    def _client(self) -> ChatClient:
        return ChatClient(self.url, self.timeout, self.retries, self.backoff)

    def _refused(self, error: NotAccepted) -> EndpointError:
        fix = {
            401: f"set {API_KEY} in the environment",
            403: f"set {API_KEY} in the environment to a key that may use the model",
            404: "correct the URL (it usually ends in /v1) or --endpoint_model",
        }.get(error.status, "correct --endpoint, --endpoint_model or --endpoint_options")
        if 300 <= error.status < 400:
            fix = f"redirects are not followed; pass {error.location or 'its target'}"
        return EndpointError(f"--endpoint: expected an answer from {self.url}, got {error}; {fix}")
