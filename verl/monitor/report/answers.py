"""Sample answers of a run at several steps, from the files that its validations leave."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from verl.monitor.report.points import rounded
from verl.monitor.series import as_number

logger = logging.getLogger(__name__)

FOLDER, FILES = "val_samples", "step_*.parquet"
# What a page shows: prompts, steps of each, letters of a text.
PROMPTS, STEPS, LETTERS = 8, 4, 3000


def read_answers(folder: Path) -> dict[str, Any] | None:
    """Some prompts with the teacher's answer and the student's at some steps, the first and the last among them; None
    where the run has kept none. Files that cannot be read are left out with a warning."""
    tables = {}
    for file in (folder / FOLDER).glob(FILES):
        number = file.stem.removeprefix("step_")
        if number.isdigit():
            tables[int(number)] = file
    steps = spread(sorted(tables), STEPS)
    rows = {step: _rows(tables[step]) for step in steps}
    steps = [step for step in steps if rows[step]]
    if not steps:
        return None
    # Those that were asked at most of the steps, in the order of the last one.
    prompts = sorted(rows[steps[-1]], key=lambda prompt: -sum(prompt in rows[step] for step in steps))[:PROMPTS]
    return {
        "steps": steps,
        "prompts": [_prompt(prompt, {step: rows[step].get(prompt) for step in steps}) for prompt in prompts],
    }


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of them, evenly spread, both ends among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    """A file's rows by prompt, of several with one prompt the first."""
    import pyarrow.parquet  # slow to import

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError.
        logger.warning("%s is left out: %s", file, error)
        return {}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(_text(row.get("prompt")), row)
    return found


def _prompt(prompt: str, by_step: dict[int, dict[str, Any] | None]) -> dict[str, Any]:
    known = [row for row in by_step.values() if row is not None]
    answers = {}
    for step, row in by_step.items():
        if row is not None:
            answers[str(step)] = {
                "text": _cut(_text(row.get("student"))),
                "score": _number(row.get("score")),
                "teacher_score": _number(row.get("teacher_score")),
                "tokens": _number(row.get("tokens")),
                "finish": _text(row.get("finish_reason")),
            }
    return {"prompt": _cut(prompt), "teacher": _cut(_text(known[-1].get("teacher"))), "answers": answers}


def _text(value: Any) -> str:
    """A cell as text; chat messages one below another."""
    if isinstance(value, list):
        return "\n".join(
            f"{item.get('role', '')}: {item.get('content', '')}" if isinstance(item, dict) else str(item)
            for item in value
        )
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[:LETTERS] + " …"


def _number(value: Any) -> float | None:
    number = as_number(value)
    return None if number is None else rounded(number)
