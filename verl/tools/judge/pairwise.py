"""Which of two answers is better, or closer to the teacher's? Asked of a strong model, pair by pair, in both orders.

Models favour a place, so each pair is asked twice with the answers swapped (Zheng et al., arXiv 2306.05685, section
3.4), and a pair counts the mean of both: 1 for a win of the student in both orders, 1/2 for a tie or two verdicts that
contradict each other, 0 for a loss in both. Verdicts are kept as they come, and are not asked for again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from verl.tools.judge.endpoint import Endpoint, EndpointError
from verl.tools.judge.kept import Kept, digest
from verl.tools.judge.statistics import Estimate, clustered_mean
from verl.utils.progress import Progress

MOST_UNREADABLE = 0.1
FIRST_LOOK = 8  # verdicts after which an endpoint that gave none is given up
ORDERS = (0, 1)  # the student's answer first, the reference's first

_TASKS = {
    "better": "Judge which answer is the better one to the conversation's last message: correct, complete, helpful and "
    "well written. A longer answer is not better for its length, nor is the first for its place.",
    "closer": "Judge which answer is closer to the reference answer in what it says, in style, structure and length. "
    "Do not judge which is better, only which is more like the reference.",
}
_FORM = (
    "Give your reasons in one or two sentences, then end with a line of exactly one of these forms:\n"
    "VERDICT: A\nVERDICT: B\nVERDICT: TIE"
)
_VERDICT = re.compile(r"VERDICT\W{0,8}(?:answer )?(A|B|(?:a )?TIE)[^\w\n]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Match:
    """A student's answer and the reference's to one prompt (its number, from 0). `teacher` is shown for "closer"."""

    prompt: int
    conversation: list[dict[str, str]]
    student: str
    reference: str
    teacher: str


def question(match: Match, asked: str, order: int) -> list[dict[str, str]]:
    """The chat messages that ask for one verdict."""
    first, second = (match.student, match.reference) if order == 0 else (match.reference, match.student)
    parts = [("conversation", "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in match.conversation))]
    parts += [("reference answer", match.teacher)] if asked == "closer" else []
    parts += [("answer A", first), ("answer B", second)]
    text = "\n\n".join(f"=== {title} ===\n{body}\n=== end of {title} ===" for title, body in parts)
    return [
        {"role": "system", "content": f"{_TASKS[asked]}\n{_FORM}"},
        {"role": "user", "content": f"{text}\n\n{_FORM}"},
    ]


def read_verdict(reply: str, order: int) -> float | None:
    """1 if the student's answer won, 1/2 for a tie, 0 if it lost, by the reply's last verdict; None without one."""
    found = _VERDICT.findall(reply)
    if not found:
        return None
    verdict = found[-1].upper()
    return 0.5 if verdict.endswith("TIE") else float((verdict == "A") == (order == 0))


# ---------------------------------------------------------------------------------------------------------------------
# Asking


@dataclass(frozen=True)
class Pairwise:
    """Of one student against the reference, over the prompts with two readable verdicts.

    win_rate: mean of the pairs' scores. wins, ties, losses: pairs with score above, at and below 1/2.
    first_place: share of the verdicts other than ties that went to the answer that came first; 1/2 is a fair judge.
    identical: pairs of equal texts, ties that were not asked for. unreadable: pairs left out.
    """

    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    first_place: float
    identical: int
    unreadable: int
    scores: np.ndarray  # (pairs,)
    prompts: np.ndarray  # (pairs,)


def tally(matches: Sequence[Match], verdicts: Sequence[tuple[float | None, float | None]]) -> Pairwise:
    """From each match's verdicts in ORDERS, see `read_verdict`."""
    both = [(m, v) for m, v in zip(matches, verdicts, strict=True) if None not in v]
    scores = np.array([sum(v) / 2 for _, v in both])
    prompts = np.array([m.prompt for m, _ in both])
    firsts = [v if order == 0 else 1 - v for _, pair in both for order, v in enumerate(pair) if v != 0.5]
    return Pairwise(
        win_rate=clustered_mean(scores, prompts),
        wins=int((scores > 0.5).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores < 0.5).sum()),
        first_place=float(np.mean(firsts)) if firsts else 0.5,
        identical=sum(m.student == m.reference for m, _ in both),
        unreadable=len(matches) - len(both),
        scores=scores,
        prompts=prompts,
    )


def compare(
    matches: Sequence[Match], asked: str, endpoint: Endpoint, kept: Kept, concurrency: int, name: str
) -> Pairwise:
    """Ask for every verdict that is not kept, `concurrency` at a time.

    Raises:
        EndpointError: it cannot be used, or more than MOST_UNREADABLE of its replies have no verdict.
    """
    requests = {
        (number, order): endpoint.body(question(match, asked, order))
        for number, match in enumerate(matches)
        if match.student != match.reference
        for order in ORDERS
    }
    known = {key: digest(body) for key, body in requests.items()}
    missing = [key for key in requests if known[key] not in kept.replies]
    bad: list[str] = []

    def ask(key: tuple[int, int]) -> None:
        number, order = key
        reply = endpoint.ask(requests[key]["messages"])
        verdict = read_verdict(reply, order)
        if verdict is None:
            bad.append(reply)
            if len(bad) >= FIRST_LOOK and len(bad) > MOST_UNREADABLE * len(missing):
                raise _nonsense(bad, len(missing))
            return
        about = {"student": name, "asked": asked, "prompt": matches[number].prompt, "order": order}
        kept.put(known[key], reply, **about, verdict=verdict)

    _run_all(ask, missing, concurrency, f"verdicts on {name}")
    if len(bad) > MOST_UNREADABLE * len(missing):
        raise _nonsense(bad, len(missing))

    def verdict(number: int, order: int) -> float | None:
        if (number, order) not in known:
            return 0.5
        return read_verdict(kept.replies.get(known[number, order], ""), order)

    return tally(matches, [tuple(verdict(number, order) for order in ORDERS) for number in range(len(matches))])


def _run_all(ask, keys: Sequence[tuple[int, int]], concurrency: int, what: str) -> None:
    """All of them, or the first error, after which nothing more is asked."""
    with ThreadPoolExecutor(concurrency) as pool, Progress(len(keys), what, "comparison") as progress:
        futures = [pool.submit(ask, key) for key in keys]
        for future in futures:
            future.add_done_callback(lambda _: progress.update())
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _nonsense(bad: Sequence[str], asked: int) -> EndpointError:
    return EndpointError(
        f"--endpoint: expected replies that end in 'VERDICT: A', 'VERDICT: B' or 'VERDICT: TIE', got {len(bad)} of "
        f"{asked} without, such as {' '.join(bad[0].split())[:200]!r}; pass a stronger --endpoint_model, or more room "
        "in --endpoint_options, e.g. '{\"max_tokens\": 2048}'"
    )
