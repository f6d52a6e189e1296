"""From files to findings, in the order in which they are cheap, and what is written of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from verl.data_tools.check.answers import findings_of_answer
from verl.data_tools.check.duplicates import find_duplicates, find_overlap
from verl.data_tools.check.findings import KINDS, NEEDS, Finding, Samples, last_question
from verl.data_tools.check.keys import findings_of_secrets
from verl.data_tools.check.languages import identifier, language_of
from verl.data_tools.check.lengths import find_outliers
from verl.data_tools.check.report import Report, render, to_json
from verl.data_tools.check.rows import look_at, progress, read
from verl.data_tools.command_line import DONE, FOUND, Outcome
from verl.data_tools.writing import check_target, report_text, write_report, write_rows
from verl.utils.dataset.rows import Row

# What no data should have.
DEFAULT_FAIL = ("bad", "empty", "overlap")


def run(options: argparse.Namespace) -> Outcome:
    """The report, with FOUND where something of --fail_on was found.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    fail_on = fail_list(options)
    inputs = [*options.files, *options.against]
    out = check_target("--out", options.out, options.overwrite, inputs) if options.out else None
    target = None
    if options.json and options.json != "-":
        target = check_target("--json", options.json, options.overwrite, inputs, (".json",))
    rows, others = read(options.files), read(options.against) if options.against else []
    report = _look(options, rows, others)
    if out is not None:
        write_rows(out, list(_flagged(rows, report.found)))
        report.notes.append(f"wrote {out}: {len({finding.row for finding in report.found}):,} rows with findings")
    report.failed = [kind for kind in fail_on if report.rows_of(kind)]
    code = FOUND if report.failed else DONE
    if target is not None:
        write_report(target, to_json(report, options.examples))
    if options.json == "-":
        return Outcome(report_text(to_json(report, options.examples)), code)
    return Outcome(render(report, options.examples), code)


def fail_list(options: argparse.Namespace) -> list[str]:
    """The kinds that make the command fail; ValueError for one that there is not, or that would never be found."""
    if options.fail_on is None:
        return list(DEFAULT_FAIL)
    named = [kind.strip() for kind in options.fail_on.split(",") if kind.strip()]
    if named in (["none"], ["any"]):
        return list(KINDS) if named == ["any"] else []
    for kind in named or [""]:
        if kind not in KINDS:
            raise ValueError(
                f"--fail_on: expected kinds of {', '.join(KINDS)}, or any, or none, got {kind or 'nothing'}"
            )
        if kind in NEEDS and not getattr(options, NEEDS[kind]):
            raise ValueError(f"--fail_on: {kind} is only looked for with --{NEEDS[kind]}; pass that too")
    return named


def _look(options: argparse.Namespace, rows: list[Row], others: list[Row]) -> Report:
    tokenization = None
    if options.model:
        from verl.data_tools.check import model
        from verl.data_tools.model import find_tokenization

        tokenization = find_tokenization(
            options.model, options.apply_chat_template_kwargs, "text", options.trust_remote_code
        )
    template = None if tokenization is None else model.template_check(tokenization)
    samples, found = look_at(rows, options.prompt_key, options.teacher_key, template)
    looked_for = [kind for kind in KINDS if kind not in NEEDS or getattr(options, NEEDS[kind])]
    report = Report(rows, samples, found, looked_for)
    report.notes += _notes(options)
    if others:
        theirs, bad = look_at(others, options.prompt_key, options.teacher_key, None)
        report.against = len(others)
        if bad:
            first = f"{others[bad[0].row].place}: {bad[0].reason}"
            report.notes.append(f"of --against, {len(bad):,} rows are bad or empty; the first is {first}")
        found += find_overlap(samples, theirs, options.near)
    found += find_duplicates(samples, options.near)
    found += _of_rows(samples, report)
    if tokenization is not None:
        tokens = model.Tokens(tokenization)
        found += tokens.findings(samples)
        report.lengths, report.unit = tokens.lengths, "tokens"
    found += find_outliers(report.lengths, report.unit)
    return report


def _notes(options: argparse.Namespace) -> Iterator[str]:
    for flag in dict.fromkeys(NEEDS.values()):
        if not getattr(options, flag):
            kinds = [kind for kind, needed in NEEDS.items() if needed == flag]
            yield f"not looked for without --{flag}: {', '.join(kinds)}"
    if identifier() is None:
        yield "languages are told by script only: py3langid, which tells more, comes with pip install -e '.[data]'"


def _of_rows(samples: Samples, report: Report) -> Iterator[Finding]:
    """What each row shows by itself; the report gets languages and lengths in characters on the way."""
    for number, sample in enumerate(progress(samples, "looking at texts")):
        report.lengths.append(None)
        if sample is None:
            continue
        yield from findings_of_answer(number, sample)
        yield from findings_of_secrets(number, sample)
        question = last_question(sample.messages)
        prompt, answer = language_of(question), language_of(sample.answer)
        report.prompt_languages[str(prompt)] += 1
        report.answer_languages[str(answer)] += 1
        if prompt.differs(answer):
            yield Finding("language", number, f"{prompt} to {answer}", sample.answer)
        report.lengths[-1] = sum(len(message["content"]) for message in sample.messages), len(sample.answer)


def _flagged(rows: Sequence[Row], found: Iterable[Finding]) -> Iterator[dict[str, Any]]:
    flags: dict[int, list[dict[str, str]]] = {}
    for finding in found:
        one = {"kind": finding.kind, "reason": finding.reason, "shown": finding.shown}
        flags.setdefault(finding.row, []).append(one)
    for number in sorted(flags):
        row = rows[number]
        yield {"file": str(Path(row.path)), "row": row.number, "flags": flags[number], "record": row.record}
