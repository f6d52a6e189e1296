"""What was found, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.data_tools.check.findings import KINDS, Finding, Samples
from verl.data_tools.check.lengths import Spread, spread_of
from verl.utils.console import shorten
from verl.utils.dataset.rows import Row

_SHOWN_REASONS = 5
_SHOWN_LANGUAGES = 8
_EXAMPLE_CHARACTERS = 140


@dataclass
class Report:
    """Findings in rows.

    rows, samples: of the files, in order; no sample where training refuses the row.
    found: in no order.
    looked_for: the kinds that could be found.
    against: how many rows there were to compare with.
    lengths: of prompt and answer of each row, in `unit`s.
    failed: the kinds of --fail_on that were found.
    """

    rows: list[Row]
    samples: Samples
    found: list[Finding]
    looked_for: Sequence[str] = tuple(KINDS)
    against: int = 0
    lengths: list[tuple[int, int] | None] = field(default_factory=list)
    unit: str = "characters"
    prompt_languages: Counter[str] = field(default_factory=Counter)
    answer_languages: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Finding]:
        """The findings of a kind, in the order of the rows."""
        return sorted((finding for finding in self.found if finding.kind == kind), key=lambda finding: finding.row)

    def rows_of(self, kind: str) -> int:
        """In how many rows there is one of a kind."""
        return len({finding.row for finding in self.found if finding.kind == kind})

    def place(self, row: int) -> str:
        """Where a row is."""
        return self.rows[row].place

    def spreads(self) -> tuple[Spread, Spread] | None:
        """Of prompts and answers; None without any."""
        there = [pair for pair in self.lengths if pair is not None]
        return (spread_of([p for p, _ in there]), spread_of([a for _, a in there])) if there else None


# ---------------------------------------------------------------------------------------------------------------------
# For people


def render(report: Report, examples: int) -> str:
    """The report: a table of kinds, then each kind with its reasons and examples, then what the data is like."""
    there = [kind for kind in KINDS if report.rows_of(kind)]
    lines = [_head(report), ""]
    if there:
        lines.append(f"{'kind':<15}{'rows':>8}{'share':>9}  first")
    for kind in there:
        count, first = report.rows_of(kind), report.of_kind(kind)[0].row
        failed = "  FAILS" if kind in report.failed else ""
        lines.append(f"{kind:<15}{count:>8,}{count / len(report.rows):>9.2%}  {report.place(first)}{failed}")
    clear = [kind for kind in report.looked_for if kind not in there]
    if clear:
        lines.append(f"{'nothing of' if there else 'nothing found of'}: {', '.join(clear)}")
    for kind in there:
        lines += ["", *_kind(report, kind, examples)]
    lines += ["", *_nature(report), *report.notes]
    verdict = f"found of --fail_on: {', '.join(report.failed)}" if report.failed else "nothing of --fail_on was found"
    return "\n".join([*lines, verdict])


def _head(report: Report) -> str:
    counts = Counter(str(row.path) for row in report.rows)
    files = ", ".join(f"{path} ({count:,} rows)" for path, count in counts.items())
    against = f", against {report.against:,} rows" if report.against else ""
    flagged = len({finding.row for finding in report.found})
    return f"{files}{against}: something in {flagged:,} of {len(report.rows):,} rows (counted from 0)"


def _kind(report: Report, kind: str, examples: int) -> Iterator[str]:
    yield f"{kind}: {KINDS[kind]}"
    findings = report.of_kind(kind)
    counts = Counter(finding.reason for finding in findings)
    for reason, count in counts.most_common(_SHOWN_REASONS):
        first = next(finding for finding in findings if finding.reason == reason)
        yield f"  {count:,} x {reason}; first in {report.place(first.row)}"
    if len(counts) > _SHOWN_REASONS:
        yield f"  and {len(counts) - _SHOWN_REASONS:,} other reasons"
    for finding in _spread_out(findings, examples):
        if finding.shown:
            # Of a cut answer the end shows it, and that is what is kept of it.
            shown = finding.shown[-_EXAMPLE_CHARACTERS:] if kind in ("cut", "no_end") else finding.shown
            yield f"    row {report.rows[finding.row].number}: {shorten(shown, _EXAMPLE_CHARACTERS)}"


def _spread_out(findings: list[Finding], count: int) -> list[Finding]:
    """So many of them, from the first to the last."""
    if len(findings) <= count:
        return findings
    return [findings[place * (len(findings) - 1) // max(1, count - 1)] for place in range(count)]


def _nature(report: Report) -> Iterator[str]:
    spreads = report.spreads()
    if spreads is None:
        return
    for name, spread, languages in zip(
        ("prompts", "answers"), spreads, (report.prompt_languages, report.answer_languages), strict=True
    ):
        total = languages.total()
        most = languages.most_common(_SHOWN_LANGUAGES)
        mix = ", ".join(f"{language} {count / total:.1%}" for language, count in most)
        yield (
            f"{name}: {spread.median:,} {report.unit} at the median, half of them {spread.low:,} to {spread.high:,}, "
            f"all {spread.least:,} to {spread.most:,}; {mix}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# For programs


def to_json(report: Report, examples: int) -> dict[str, Any]:
    """The report as an object of JSON; kinds of which nothing was found are there with 0."""
    spreads = report.spreads()
    sides = ("prompts", "answers")
    return {
        "rows": len(report.rows),
        "files": dict(Counter(str(row.path) for row in report.rows)),
        "against_rows": report.against,
        "flagged_rows": len({finding.row for finding in report.found}),
        "failed": report.failed,
        "kinds": {kind: _kind_as_json(report, kind, examples) for kind in KINDS},
        "lengths": {"unit": report.unit}
        | ({side: spread._asdict() for side, spread in zip(sides, spreads, strict=True)} if spreads else {}),
        "languages": {"prompts": dict(report.prompt_languages), "answers": dict(report.answer_languages)},
        "notes": report.notes,
    }


def _kind_as_json(report: Report, kind: str, examples: int) -> dict[str, Any]:
    findings = report.of_kind(kind)
    firsts: dict[str, Finding] = {}
    for finding in findings:
        firsts.setdefault(finding.reason, finding)
    counts = Counter(finding.reason for finding in findings)
    return {
        "means": KINDS[kind],
        "looked_for": kind in report.looked_for,
        "rows": report.rows_of(kind),
        "share": report.rows_of(kind) / len(report.rows),
        "reasons": [
            {"reason": reason, "count": count, "first": _place_as_json(report, firsts[reason])}
            for reason, count in counts.most_common()
        ],
        "examples": [
            _place_as_json(report, finding) | {"reason": finding.reason, "shown": finding.shown}
            for finding in _spread_out(findings, examples)
        ],
    }


def _place_as_json(report: Report, finding: Finding) -> dict[str, Any]:
    row = report.rows[finding.row]
    return {"file": str(row.path), "row": row.number}
