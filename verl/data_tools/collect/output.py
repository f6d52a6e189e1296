"""From the log to files: rows to train on, rows kept apart by what is wrong with them, and what it all came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.data_tools.collect.answers import APART, Kind, Reasoning, judge_answer, with_reasoning
from verl.data_tools.collect.asking import Ending, Tally
from verl.data_tools.collect.cost import Account
from verl.data_tools.collect.log import AnswerLog
from verl.data_tools.collect.prompts import Prompt, Prompts, Request
from verl.data_tools.writing import write_report, write_rows

ANSWER_COLUMNS = ("content", "teacher_response", "teacher_model", "finish_reason", "answer_number", "error")


@dataclass(frozen=True)
class Wanted:
    """What becomes rows: `included` kinds train besides the answered ones; with `system`, rows have the system prompt
    that the teacher saw."""

    included: Sequence[Kind] = ()
    reasoning: Reasoning = "drop"
    system: bool = True


@dataclass(frozen=True)
class Written:
    """Rows of each kind, those that train, and answers whose thoughts were dropped."""

    kinds: Counter[Kind]
    trained: int
    thoughts: int
    files: dict[str, Path]  # "train", and kinds kept apart


def write_answers(
    out: Path, folder: Path, log: AnswerLog, asked: Sequence[tuple[Prompt, Request]], wanted: Wanted
) -> Written:
    """Write the training file, in the prompts' order, and a file in `folder` for every kind that is kept apart."""
    prompts = {request.key: (prompt, request) for prompt, request in asked}
    rows: dict[str, list[dict[str, Any]]] = {}
    kinds: Counter[Kind] = Counter()
    thoughts = 0
    for record in log.get(prompts):
        prompt, request = prompts[record["key"]]
        answer = judge_answer(record)
        kinds[answer.kind] += 1
        trains = answer.kind == "answered" or (answer.kind in wanted.included and answer.text.strip() != "")
        thoughts += trains and bool(answer.thought)
        rows.setdefault("train" if trains else answer.kind, []).append(
            {name: value for name, value in prompt.columns.items() if name not in ANSWER_COLUMNS}
            | {
                "content": request.messages if wanted.system else prompt.messages,
                "teacher_response": with_reasoning(answer, wanted.reasoning),
                "teacher_model": record.get("model"),
                "finish_reason": record.get("finish_reason"),
                "answer_number": record["number"],
            }
            | ({"error": record["error"]} if "error" in record else {})
        )
    files = {"train": out} | {kind: folder / f"{kind}.jsonl" for kind in APART}
    for name, path in files.items():
        if name in rows:
            write_rows(path, rows[name])
        elif name != "train":
            path.unlink(missing_ok=True)
    return Written(kinds, len(rows.get("train", [])), thoughts, {name: files[name] for name in files if name in rows})


def summarise(
    prompts: Prompts, wanted: int, written: Written, tally: Tally, account: Account, ending: Ending, log: AnswerLog
) -> tuple[str, dict[str, Any]]:
    """What it came to, as text and as a record."""
    have = sum(written.kinds.values())
    answers = have - written.kinds["failed"]
    lines = [f"answers: {answers:,} of {wanted:,} wanted, {tally.answered:,} of them by this run"]
    names = {"train": "to train on", "failed": "failed for good"}
    counts = {"train": written.trained} | {kind: written.kinds[kind] for kind in APART}
    for name, count in counts.items():
        place = f"   {written.files[name]}" if name in written.files else ""
        if count or name == "train":
            lines.append(f"  {names.get(name, name):16}{count:9,}{place}")
    if wanted > have:
        trouble = f"; {tally.unanswered:,} got none after all tries, the last: {tally.last_trouble}"
        lines.append(f"  {'not there yet':16}{wanted - have:9,}{trouble if tally.unanswered else ''}")
    lines += _remarks(prompts, written, tally, account, log)
    if ending.why == "limit":
        lines.append(f"ended by --budget or --max_tokens_total: {ending.said}")
    if wanted > have:
        lines.append("to go on, run the same command again: no answer that is there is asked for twice")
    record = {
        "wanted": wanted, "kinds": dict(written.kinds), "to_train_on": written.trained, "this_run": asdict(tally),
        "prompt_tokens": account.prompt_tokens, "answer_tokens": account.answer_tokens,
        "answers_with_estimated_tokens": account.uncounted, "money": account.money,
        "repeated_prompts": prompts.repeated, "unusable_rows": len(prompts.unusable), "ended_by": ending.why,
        "files": {name: str(path) for name, path in written.files.items()},
    }  # fmt: skip
    return "\n".join(lines), record


def _remarks(prompts: Prompts, written: Written, tally: Tally, account: Account, log: AnswerLog) -> list[str]:
    said = f"tokens: {account.prompt_tokens:,} of prompts, {account.answer_tokens:,} of answers"
    if account.uncounted:
        said += f" (those of {account.uncounted:,} answers by our count, as the server gave none)"
    if account.prices:
        said += f"; {account.money:.2f} in money"
    lines = [said]
    if prompts.repeated or prompts.unusable:
        lines.append(
            f"rows left out: {prompts.repeated:,} repeat a prompt, {len(prompts.unusable):,} cannot be asked"
            + (f"; the first: {prompts.unusable[0]}" if prompts.unusable else "")
        )
    if written.thoughts:
        lines.append(
            f"{written.thoughts:,} answers came with their reasoning, which the log keeps: --reasoning drop leaves it "
            "out of the rows, --reasoning think puts it in front; changing it asks nothing again"
        )
    if log.damaged:
        lines.append(f"{log.damaged:,} damaged lines of {log.path} were passed over; what they held is asked for again")
    if tally.lost:
        lines.append(f"{tally.lost:,} answers found no room on the disk and are asked for again")
    return lines


def write_summary(path: Path, record: dict[str, Any]) -> None:
    """Beside the log, for programs."""
    write_report(path, record)
