"""Pairwise verdicts: by hand, and over a real HTTP server with moods."""

import socket
import threading
from collections import Counter

import pytest
from scipy import stats

from tests.tools.chat_server import Server, part
from verl.tools.judge.endpoint import API_KEY, Endpoint, EndpointError
from verl.tools.judge.kept import Kept
from verl.tools.judge.pairwise import Match, compare, question, read_verdict, tally

KEY = "sk-very-secret-123"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(server: Server, **changes) -> Endpoint:
    return Endpoint(server.url, "strong", **{"backoff": 0.01, "timeout": 5.0, "retries": 3, **changes})


def match(prompt: int, student: str, reference: str = "teacher's") -> Match:
    return Match(prompt, [{"role": "user", "content": f"问题 {prompt}?"}], student, reference, "the measure")


def longer_wins(text: str) -> str:
    first, second = (len(part(text, f"answer {place}")) for place in "AB")
    return f"Because.\nVERDICT: {'TIE' if first == second else 'A' if first > second else 'B'}"


MATCHES = [match(0, "much longer than it"), match(1, "short"), match(2, "9 letters"), match(3, "teacher's")]


# ---- by hand


@pytest.mark.parametrize(
    ("reply", "first", "second"),
    [
        ("A it is.\nVERDICT: A", 1.0, 0.0),
        ("verdict: b", 0.0, 1.0),
        ("**VERDICT: TIE**", 0.5, 0.5),
        ("VERDICT: A\nNo, wait.\n**Verdict**: Answer B.", 0.0, 1.0),
        ("Verdict: a tie", 0.5, 0.5),
        ("VERDICT：B", 0.0, 1.0),
        ("VERDICT: Both are fine", None, None),
        ("I cannot say", None, None),
        ("", None, None),
    ],
)
def test_verdicts_are_read(reply, first, second):
    assert read_verdict(reply, 0) == first and read_verdict(reply, 1) == second


def test_win_rate_by_hand():
    # Won twice, won and tied, contradicting, tied twice, lost twice; one without a second verdict.
    matches = [match(number, "x") for number in range(6)]
    result = tally(matches, [(1.0, 1.0), (1.0, 0.5), (1.0, 0.0), (0.5, 0.5), (0.0, 0.0), (1.0, None)])
    scores = [1.0, 0.75, 0.5, 0.5, 0.0]
    low, high = stats.t.interval(0.95, 4, loc=0.55, scale=stats.sem(scores))
    assert result.scores.tolist() == scores
    assert (result.wins, result.ties, result.losses, result.unreadable) == (2, 2, 1, 1)
    assert result.win_rate.value == pytest.approx(0.55)
    assert (result.win_rate.low, result.win_rate.high) == (pytest.approx(low, abs=0.01), 1.0) and high > 1
    # First places: won, lost | won | won, won | - | lost, won.
    assert result.first_place == pytest.approx(5 / 7)


def test_question_shows_both_orders_and_the_measure_only_where_it_is_asked_for():
    one, other = (question(match(0, "mine", "theirs"), "better", order)[1]["content"] for order in (0, 1))
    assert (part(one, "answer A"), part(one, "answer B")) == ("mine", "theirs")
    assert (part(other, "answer A"), part(other, "answer B")) == ("theirs", "mine")
    assert "问题 0?" in part(one, "conversation") and "the measure" not in one
    assert part(question(match(0, "x", "y"), "closer", 0)[1]["content"], "reference answer") == "the measure"


# ---- over HTTP


def test_asks_in_both_orders_and_once_only(server, tmp_path):
    server.verdict = longer_wins
    kept = Kept(tmp_path / "v.jsonl")
    result = compare(MATCHES, "better", endpoint(server), kept, 4, "s")
    assert result.scores.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert (result.first_place, result.identical, result.unreadable) == (0.5, 1, 0)
    # The identical pair is not asked for.
    assert len(server.asked) == 6 and server.keys == {f"Bearer {KEY}"}
    assert server.asked[0]["model"] == "strong" and server.asked[0]["temperature"] == 0

    again = compare(MATCHES, "better", endpoint(server), Kept(tmp_path / "v.jsonl"), 4, "s")
    assert again.scores.tolist() == result.scores.tolist() and len(server.asked) == 6
    changed = [*MATCHES[:1], match(1, "a new answer"), *MATCHES[2:]]
    compare(changed, "better", endpoint(server), Kept(tmp_path / "v.jsonl"), 4, "s")
    assert len(server.asked) == 8
    compare(MATCHES, "closer", endpoint(server), Kept(tmp_path / "v.jsonl"), 4, "s")
    assert len(server.asked) == 14
    assert KEY not in (tmp_path / "v.jsonl").read_text()


def test_goes_on_where_a_killed_run_stopped(server, tmp_path):
    server.verdict = longer_wins
    path = tmp_path / "v.jsonl"
    compare(MATCHES, "better", endpoint(server), Kept(path), 1, "s")
    lines = path.read_text().splitlines()
    # The line under way was cut within a character.
    path.write_bytes(("\n".join(lines[:3]) + "\n" + lines[3][:40] + "四").encode()[:-1])
    server.asked.clear()
    result = compare(MATCHES, "better", endpoint(server), Kept(path), 1, "s")
    assert result.scores.tolist() == [1.0, 0.0, 0.5, 0.5] and len(server.asked) == 3
    assert len(Kept(path).replies) == 6


def test_any_reply_can_be_kept(tmp_path):
    kept = Kept(tmp_path / "v.jsonl")
    kept.put("x", "one\u2028two\x85three\r\n四")
    kept.put("y", "z")
    assert Kept(tmp_path / "v.jsonl").replies == kept.replies


@pytest.mark.parametrize("mood", [429, 500, 503, "hang up", "sleep"])
def test_tries_again(server, tmp_path, mood):
    server.moods = [mood, mood]
    patience = {"timeout": 0.2} if mood == "sleep" else {}
    result = compare(MATCHES[:1], "better", endpoint(server, **patience), Kept(tmp_path / "v"), 1, "s")
    assert result.ties == 1 and len(server.asked) == 4


def test_gives_up_with_what_is_kept(server, tmp_path):
    server.verdict = longer_wins
    path = tmp_path / "v.jsonl"
    compare(MATCHES[:1], "better", endpoint(server), Kept(path), 1, "s")
    server.moods = [500] * 100
    with pytest.raises(EndpointError) as error:
        compare(MATCHES, "better", endpoint(server), Kept(path), 2, "s")
    message = str(error.value)
    assert "got HTTP 500: mood 500" in message and "after 4 tries" in message and "run again" in message
    assert KEY not in message and len(Kept(path).replies) == 2


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (401, f"set {API_KEY} in the environment"),
        (404, "correct the URL"),
        (400, "--endpoint_options"),
        (307, "redirects are not followed; pass /elsewhere"),
    ],
)
def test_refusals_are_not_tried_again(server, status, fix):
    server.moods = [status]
    with pytest.raises(EndpointError, match=f"got HTTP {status}") as error:
        endpoint(server).ask([{"role": "user", "content": "?"}])
    assert fix in str(error.value) and KEY not in str(error.value) and len(server.asked) == 1


@pytest.mark.parametrize("raw", ["<html>hello</html>", '{"object": "list"}', '{"choices": [{"message": {}}]}', ""])
def test_what_is_no_completion_is_named(server, raw):
    server.raw = raw
    with pytest.raises(EndpointError, match="expected a chat completion") as error:
        endpoint(server).ask([{"role": "user", "content": "?"}])
    assert f"got {raw or 'nothing'}" in str(error.value) and "correct the URL" in str(error.value)


def test_nonsense_is_named(server, tmp_path):
    server.verdict = lambda text: "Lorem ipsum"
    with pytest.raises(EndpointError, match=r"expected replies that end in .* got \d+ of \d+ without.*Lorem ipsum"):
        compare([match(n, f"x{n}") for n in range(30)], "better", endpoint(server), Kept(tmp_path / "v"), 1, "s")
    assert len(server.asked) < 20


def test_a_few_unreadable_replies_are_left_out_and_asked_again(server, tmp_path):
    matches = [match(n, f"answer {n}") for n in range(12)]
    server.verdict = lambda text: "hm" if part(text, "answer A") == "answer 5" else "VERDICT: A"
    result = compare(matches, "better", endpoint(server), Kept(tmp_path / "v"), 4, "s")
    assert (result.unreadable, result.ties, result.first_place) == (1, 11, 1.0)
    server.asked.clear()
    server.verdict = lambda text: "VERDICT: A"
    assert compare(matches, "better", endpoint(server), Kept(tmp_path / "v"), 4, "s").unreadable == 0
    assert len(server.asked) == 1


def test_concurrency(server, tmp_path):
    server.hold = threading.Event()
    threading.Timer(0.5, server.hold.set).start()
    compare([match(n, f"x{n}") for n in range(6)], "better", endpoint(server), Kept(tmp_path / "v"), 3, "s")
    assert server.most == 3 and Counter(len(body["messages"]) for body in server.asked) == {2: 12}


def test_options_go_into_every_request(server):
    asking = endpoint(server, options={"temperature": None, "max_tokens": 7})
    asking.ask([{"role": "user", "content": "?"}])
    assert server.asked == [
        {"model": "strong", "messages": [{"role": "user", "content": "?"}], "max_tokens": 7},
    ]


def test_an_endpoint_that_is_not_there(server):
    endpoint(server).check()  # It answers 404 to /models: something is there.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/v1", "127.0.0.1/v1"):
        with pytest.raises(EndpointError, match=r"expected an OpenAI-compatible endpoint at .*, got .*; start the"):
            Endpoint(url, "m").check()
