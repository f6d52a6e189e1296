"""The client that judge and collect share: when requests start, what waits mean, and what replies are."""

import socket
import threading
import time
from email.utils import formatdate

import pytest

from tests.tools.chat_server import Server
from verl.tools.chat_client import (
    ChatClient,
    EndpointError,
    NoAnswer,
    NoCompletion,
    NotAccepted,
    Pace,
    Reply,
    Stopped,
    _seconds,
    read_reply,
)


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ---- pace


def test_requests_are_spread_over_all_threads():
    pace, began = Pace(requests=1200), []
    threads = [threading.Thread(target=lambda: (pace.start(0), began.append(time.monotonic()))) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = [later - earlier for earlier, later in zip(sorted(began), sorted(began)[1:], strict=False)]
    # 60 / 1200 s; a thread may be woken late and the next one in time.
    assert sum(gaps) >= 8 * 0.05 - 0.01


def test_tokens_are_set_right():
    pace = Pace(tokens=6000)
    pace.start(100)  # 1 s
    pace.settle(-80)  # 0.2 s
    before = time.monotonic()
    pace.start(0)
    assert 0.1 < time.monotonic() - before < 0.8


def test_nothing_starts_after_the_stop():
    pace = Pace(requests=1)
    pace.start(0)
    threading.Timer(0.1, pace.stop.set).start()
    with pytest.raises(Stopped):
        pace.start(0)
    with pytest.raises(Stopped):
        pace.sleep(100)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(None, 0), ("", 0), ("7", 7), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("inf", 3600), ("99999", 3600), ("soon", 0)],
)
def test_retry_after(asked, seconds):
    assert _seconds(asked) == seconds


def test_retry_after_a_date():
    assert 27 < _seconds(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert _seconds(formatdate(time.time() - 30, usegmt=True)) == 0


# ---- replies


def test_replies_by_hand():
    raw = (
        '{"model": "m", "choices": [{"message": {"content": "a\\ud83d\\ude00b\\ud83d", "reasoning": "r"}, '
        '"finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    )
    assert read_reply(raw) == Reply("a😀b\ufffd", "r", "", "stop", "m", 3, 4)
    assert read_reply('{"choices": [{"message": {"content": null}}], "usage": null}') == Reply(None)
    parts = '[{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'
    assert read_reply(f'{{"choices": [{{"message": {{"content": {parts}}}}}]}}').text == "ab"


@pytest.mark.parametrize(
    "raw", ["", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 1}}]}', "[" * 9999]
)
def test_what_is_no_completion(raw):
    with pytest.raises(NoCompletion):
        read_reply(raw)


def test_errors_with_status_200():
    with pytest.raises(NotAccepted, match="HTTP 402"):
        read_reply('{"error": {"code": 402, "message": "pay"}}')


# ---- over HTTP


def test_nobody_there_is_told_from_somebody_slow(server):
    with pytest.raises(NoAnswer):
        ChatClient("http://127.0.0.1:9/v1").check()
    ChatClient(server.url).check()
    listening = socket.create_server(("127.0.0.1", 0))
    with listening:
        ChatClient(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.2).check()


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.delenv("no_proxy", raising=False)
    assert ChatClient("http://teacher.invalid/v1").ask({"messages": [{"content": "?"}]}).text == "VERDICT: TIE"
    monkeypatch.setenv("no_proxy", "teacher.invalid")
    with pytest.raises(NoAnswer):
        ChatClient("http://teacher.invalid/v1", retries=0).ask({"messages": [{"content": "?"}]})


def test_a_key_is_not_in_what_a_server_says(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-123 ")
    server.moods = [400]
    with pytest.raises(NotAccepted) as error:
        ChatClient(server.url).ask({"messages": [{"content": "?"}]})
    assert error.value.said == "mood 400 for Bearer ***" and server.keys == {"Bearer sk-very-secret-123"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\r\nHost: elsewhere")
    with pytest.raises(EndpointError, match=r"^OPENAI_API_KEY: expected a key"):
        ChatClient(server.url).ask({"messages": [{"content": "?"}]})


@pytest.mark.parametrize(
    "said", [r"sk-ab/cd+ef==12", r"sk-ab\/cd+ef==12", r"sk-ab/cd\u002bef==12", r"sk-ab\u002Fcd\u002Bef\u003d=12"]
)
def test_a_key_is_found_as_json_may_write_it(monkeypatch, said):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ab/cd+ef==12")
    assert ChatClient("http://127.0.0.1:9/v1")._without_key(f'{{"content": "of {said}."}}') == '{"content": "of ***."}'
