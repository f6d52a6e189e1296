"""A comparison as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from verl.data_tools.compare.comparison import Comparison
from verl.data_tools.compare.data import Side
from verl.data_tools.compare.statistics import CONFIDENCE, Interval
from verl.data_tools.compare.verdict import discriminator_reading, headline
from verl.utils.console import shorten, table

WIDTH = 116


def render(found: Comparison) -> str:
    """The whole report, the verdict first."""
    parts = [
        headline(found.findings, found.names),
        f"{_source('A', found.a)}\n{_source('B', found.b)}\nintervals are {CONFIDENCE:.0%}; effects run from 0 to 1: a "
        "share of either set, at least, without its like in the other",
        _findings(found),
        _sizes(found),
        _vocabulary(found),
        _classifier(found),
        _topics(found),
        _styles(found),
        _overlap(found),
    ]
    if found.difficulty is not None:
        parts.append(_difficulty(found))
    said = [textwrap.fill(sentence, WIDTH, initial_indent="  ", subsequent_indent="  ") for sentence in reading(found)]
    title = f"a discriminator that is right on {found.names[0]} and not on {found.names[1]}: over-fitting, or a shift?"
    return "\n\n".join([*parts, "\n".join([title, *said])])


def reading(found: Comparison) -> list[str]:
    """The sentences on a discriminator."""
    tests = list(found.told_apart.values())
    return discriminator_reading(
        found.findings, found.names, tests, found.overlap, found.gap, found.accuracies, found.b.counts.total
    )


def _source(letter: str, side: Side) -> str:
    counts = side.counts
    drawn = f", drawn of {counts.total}" if counts.total > counts.read else ""
    repeated = counts.read - counts.left_out - len(side)
    left_out = [f"{repeated} that repeat a prompt"] if repeated else []
    left_out += [f"{counts.left_out} that cannot be used"] if counts.left_out else []
    without = f", without {' and '.join(left_out)}" if left_out else ""
    return f"{letter}  {side.name}: {len(side)} of {counts.read} rows{drawn}{without}"


def _interval(interval: Interval, form: str) -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def _p(p: float) -> str:
    return "<1e-4" if p < 1e-4 else f"{p:.2g}"


def _findings(found: Comparison) -> str:
    rows = [["all comparisons, the largest difference first", "", "effect", "p", "p, adjusted"]]
    for each in found.findings:
        verdict = "differs" if each.differs else "alike"
        numbers = [f"{each.finding.effect:.3f}", _p(each.finding.p), _p(each.adjusted)]
        rows.append([f"  {each.finding.aspect}", verdict, *numbers])
    return table(rows, left=2)


def _sizes(found: Comparison) -> str:
    rows = [["lengths", *(f"{what} {name}" for what in ("mean", "median") for name in "AB"), "B - A", "", "KS", "p"]]
    for size in found.sizes:
        means = [f"{value:.1f}" for value in size.means]
        medians = [f"{value:.0f}" for value in size.medians]
        difference = [f"{size.difference.value:+.1f}", _interval(size.difference, "+.1f")]
        rows.append([f"  {size.what}, {size.unit}", *means, *medians, *difference, f"{size.distance:.3f}", _p(size.p)])
    return table(rows)


def _vocabulary(found: Comparison) -> str:
    head = ["words of B unseen in A", "of its different words", "of all", "by chance", "", "p"]
    rows = [head]
    for what, unseen in found.vocabulary.items():
        low, middle, high = unseen.by_chance
        by_chance = [f"{middle:.2%}", f"[{low:.2%}, {high:.2%}]"]
        rows.append([f"  {what}", f"{unseen.types:.1%}", f"{unseen.tokens:.2%}", *by_chance, _p(unseen.p)])
    lines = [table(rows)]
    lines += [f"  most frequent in {what}: {' '.join(u.most)}" for what, u in found.vocabulary.items() if u.most]
    return "\n".join(lines)


def _classifier(found: Comparison) -> str:
    rows = [["told apart by a small classifier (0.5: not at all)", "accuracy", "", "p", "rows a side", "on known rows"]]
    for what, test in found.told_apart.items():
        accuracy = test.accuracy
        numbers = [f"{accuracy.value:.3f}", f"[{accuracy.low:.3f}, {accuracy.high:.3f}]", _p(test.p)]
        rows.append([f"  {what}", *numbers, str(test.rows), f"{test.fitted:.3f}"])
    lines = [table(rows)]
    for what, test in found.told_apart.items():
        for letter, words in zip("AB", test.telling, strict=True):
            lines.append(f"  {what}: speaks for {letter}: {'  '.join(words)}")
        if test.accuracy.high < 0.5:
            lines.append(f"  {what}: below 0.5, as where many of the same texts are in both sets under other prompts")
    return "\n".join(lines)


def _topics(found: Comparison) -> str:
    if found.topics is None:
        return "topics of prompts: too few words in common, or too few prompts, to be put into clusters"
    rows = [["topics of prompts", "A", "B", "B - A", "", ""]]
    for topic in found.topics.topics:
        shares = [f"{topic.a.value:.1%}", f"{topic.b.value:.1%}", f"{topic.difference.value:+.1%}"]
        more = ("more in B" if topic.difference.value > 0 else "more in A") if topic.differs else ""
        words = " ".join(topic.words) or "(others)"
        rows.append([f"  {shorten(words, 60)}", *shares, _interval(topic.difference, "+.1%"), more])
    return table(rows)


def _styles(found: Comparison) -> str:
    rows = [["style of answers", "A", "B", "B - A", "", "p"]]
    for each in found.styles:
        form, signed = (".1%", "+.1%") if each.is_share or "share" in each.name else (".2f", "+.2f")
        numbers = [f"{each.a:{form}}", f"{each.b:{form}}", f"{each.difference.value:{signed}}"]
        rows.append([f"  {each.name}", *numbers, _interval(each.difference, signed), _p(each.p)])
    return table(rows)


def _overlap(found: Comparison) -> str:
    same, near = found.overlap.same, found.overlap.near
    lines = [
        f"prompts of B that A has too: {same.value:.1%} {_interval(same, '.1%')}; these and nearly the same ones: "
        f"{near.value:.1%} {_interval(near, '.1%')}"
    ]
    for b, a in found.overlap.examples:
        lines += [f"  B: {shorten(found.b.prompts[b], 100)}", f"  A: {shorten(found.a.prompts[a], 100)}"]
    return "\n".join(lines)


def _difficulty(found: Comparison) -> str:
    each = found.difficulty
    return (
        f"the student's loss on the answers, nats per token: A {each.a:.4f} ({each.rows[0]} rows), B {each.b:.4f} "
        f"({each.rows[1]} rows); B - A {each.difference.value:+.4f} {_interval(each.difference, '+.4f')}; KS "
        f"{each.distance:.3f}, p {_p(each.p)}"
    )


def to_json(found: Comparison, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the texts."""
    sides = {
        letter: {
            "name": side.name, "rows": len(side), "rows_in_files": side.counts.total, "rows_read": side.counts.read,
            "left_out": side.counts.left_out,
        }
        for letter, side in (("a", found.a), ("b", found.b))
    }  # fmt: skip
    findings = [{**asdict(r.finding), "p_adjusted": r.adjusted, "differs": r.differs} for r in found.findings]
    return {
        "verdict": headline(found.findings, found.names),
        "discriminator": reading(found),
        "settings": dict(settings),
        **sides,
        "findings": findings,
        "lengths": [_plain(size) for size in found.sizes],
        "vocabulary": {what: _plain(unseen) for what, unseen in found.vocabulary.items()},
        "told_apart": {what: _plain(test) for what, test in found.told_apart.items()},
        "topics": None if found.topics is None else _plain(found.topics),
        "style": [_plain(style) for style in found.styles],
        "overlap": _plain(found.overlap),
        "difficulty": None if found.difficulty is None else _plain(found.difficulty),
        "trial": None if found.gap is None else _plain(found.gap),
    }


def _plain(record: Any) -> Any:
    """Records as dicts, intervals with the names of their numbers."""
    if isinstance(record, Interval):
        return record._asdict()
    if hasattr(record, "__dataclass_fields__"):
        return {name: _plain(getattr(record, name)) for name in record.__dataclass_fields__}
    if isinstance(record, list | tuple):
        return [_plain(item) for item in record]
    return record
