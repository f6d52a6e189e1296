"""What scores of teacher and student answers say about the discriminator: the table of pairs, statistics as pure
functions of arrays, and the report as text.

P pairs of a teacher's and a student's answer to one prompt; d = score(teacher) - score(student).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from verl.tools.score.data import Group, TokenizedGroups
from verl.utils.console import shorten
from verl.utils.dump import write_jsonl

# ---------------------------------------------------------------------------------------------------------------------
# The table of pairs


def pair_table(groups: Sequence[Group], tokenized: TokenizedGroups, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per pair, in the order of the files.

    Columns: `group` (the row over all files), `file`, `row` (within it), `answer` (of the row), all from 0;
    `score_diff`, `prompt_tokens`; and for both sides `{side}_score`, `{side}_raw_score`, `{side}_score_tokens` (those
    it is pooled over) and `{side}_tokens` (EOS included).
    """
    members = zip(groups, tokenized.teachers, tokenized.students, strict=True)
    places = [
        (group.row.index, str(group.row.path), group.row.number, answer, teacher, student)
        for group, teacher, students in members
        for answer, student in enumerate(students)
    ]
    table = pd.DataFrame(places, columns=["group", "file", "row", "answer", "teacher", "student"])
    lengths = np.array([(len(sequence.prompt), len(sequence.answer)) for sequence in tokenized.sequences])
    sides = {side: table.pop(side).to_numpy() for side in ("teacher", "student")}
    teacher, student = (scores["score"][numbers].astype(np.float64) for numbers in sides.values())
    table = table.assign(score_diff=teacher - student, prompt_tokens=lengths[sides["teacher"], 0])
    for side, numbers in sides.items():
        columns = {f"{side}_{name}": values[numbers] for name, values in scores.items()}
        table = table.assign(**columns, **{f"{side}_tokens": lengths[numbers, 1]})
    return table


def write_table(table: pd.DataFrame, path: Path) -> None:
    """As parquet or jsonl, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        write_jsonl(path, table.to_dict("records"))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def accuracy(d: np.ndarray) -> float:
    """The share of pairs (P,) whose teacher is strictly above."""
    return float((d > 0).mean())


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two vectors (P,); nan, not a number near 0, where either does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


@dataclass(frozen=True)
class Bin:
    """Pairs with a confidence in (low, high]; both means are nan where there is no pair."""

    low: float
    high: float
    pairs: int
    confidence: float
    observed: float


def calibration(d: np.ndarray, bins: int = 10) -> list[Bin]:
    """How often the discriminator is right when it is so sure.

    It picks the higher score of a pair with confidence sigmoid(|d|), and is right if that is the teacher's (a tie
    counts as wrong). [0.5, 1] is cut into equal bins, closed above as in Guo et al. 2017 (arXiv 1706.04599, section
    2); the first one holds 0.5 too. Per bin: mean confidence, and observed share of pairs with the teacher above.
    """
    confidence = 1 / (1 + np.exp(-np.abs(d.astype(np.float64))))
    edges = np.linspace(0.5, 1.0, bins + 1)
    member = np.digitize(confidence, edges[1:-1], right=True)
    result = []
    for number in range(bins):
        inside = member == number
        count = int(inside.sum())
        means = (confidence[inside].mean(), (d[inside] > 0).mean()) if count else (np.nan, np.nan)
        result.append(Bin(float(edges[number]), float(edges[number + 1]), count, *map(float, means)))
    return result


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """sum over bins of (pairs / all pairs) * |observed - confidence| (Guo et al., arXiv 1706.04599, section 2, eq. 3,
    where accuracy and confidence are those of the predicted class)."""
    total = sum(part.pairs for part in bins)
    return sum(part.pairs / total * abs(part.observed - part.confidence) for part in bins if part.pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def render(pairs: pd.DataFrame, groups: Sequence[Group], temperature: float, bins: int, show: int) -> str:
    """The report.

    Args:
        pairs: the table of `pair_table`, P rows.
        groups: the prompts and answers that its `group` and `answer` count.
        temperature: of the loss; the calibration is that of d / temperature.
        bins: of the calibration.
        show: pairs to show from either end of d.
    """
    d = pairs["score_diff"].to_numpy()
    ranked = pairs.iloc[np.argsort(-d, kind="stable")]
    parts = [
        _scores(pairs),
        _calibration(calibration(d / temperature, bins), temperature),
        _correlations(pairs),
        _examples(f"most separated (largest d first), {min(show, len(pairs))} of {len(pairs)}", ranked[:show], groups),
        _examples(
            f"least separated (smallest d first), {min(show, len(pairs))} of {len(pairs)}", ranked[::-1][:show], groups
        ),
    ]
    return "\n\n".join(parts if show else parts[:3])


def _scores(pairs: pd.DataFrame) -> str:
    teachers = pairs.drop_duplicates("group")
    d = pairs["score_diff"].to_numpy()
    lines = [f"{'scores':<10}{'answers':>9}{'mean':>12}{'std':>12}{'tokens':>9}"]
    for side, answers in (("teacher", teachers), ("student", pairs)):
        scores, tokens = answers[f"{side}_score"].to_numpy(), answers[f"{side}_tokens"].to_numpy()
        lines.append(f"{side:<10}{len(scores):>9}{scores.mean():>12.4f}{scores.std():>12.4f}{tokens.mean():>9.1f}")
    lines.append(f"{'d':<10}{len(d):>9}{d.mean():>12.4f}{d.std():>12.4f}")
    return "\n".join([*lines, f"accuracy (teacher strictly above): {accuracy(d):.4f} of {len(d)} pairs"])


def _calibration(bins: Sequence[Bin], temperature: float) -> str:
    confidence = "sigmoid(|d|)" if temperature == 1 else f"sigmoid(|d|/{temperature:g})"
    lines = [f"{confidence:<16}{'pairs':>7}{'confidence':>12}{'teacher above':>15}"]
    for part in bins:
        means = f"{part.confidence:>12.4f}{part.observed:>15.4f}" if part.pairs else f"{'-':>12}{'-':>15}"
        lines.append(f"{part.low:.3f}-{part.high:.3f}     {part.pairs:>7}{means}")
    return "\n".join([*lines, f"expected calibration error: {expected_calibration_error(bins):.4f}"])


def _correlations(pairs: pd.DataFrame) -> str:
    student, longer = pairs["student_tokens"].to_numpy(), pairs["teacher_tokens"] - pairs["student_tokens"]
    values = {
        "student score with its tokens": pearson(pairs["student_score"].to_numpy(), student),
        "d with teacher minus student tokens": pearson(pairs["score_diff"].to_numpy(), longer.to_numpy()),
    }
    shown = [f"{name:<38}{'undefined: no spread' if np.isnan(r) else f'{r:+.4f}'}" for name, r in values.items()]
    return "\n".join(["correlation with length (Pearson)", *shown])


def _examples(title: str, pairs: pd.DataFrame, groups: Sequence[Group]) -> str:
    """Blocks, not columns: characters of double width break columns."""
    blocks = [title]
    for place, pair in enumerate(pairs.itertuples(), start=1):
        group = groups[pair.group]
        lines = [
            f"{place}. d {pair.score_diff:+.4f}   {group.place}, answer {pair.answer}",
            f"   prompt                        {shorten(group.messages[-1]['content'])}",
            f"   teacher {_of(pair.teacher_score, pair.teacher_tokens)}  {shorten(group.teacher)}",
            f"   student {_of(pair.student_score, pair.student_tokens)}  {shorten(group.answers[pair.answer])}",
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _of(score: float, tokens: int) -> str:
    """21 characters, of which the numbers seldom need more."""
    return f"{score:+9.4f} {tokens:>4} tokens"
