"""All comparisons of two sets, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from verl.data_tools.compare import classifier, loss, sizes, style, topics, vocabulary
from verl.data_tools.compare.classifier import ToldApart, told_apart
from verl.data_tools.compare.data import Side, name_of, read_side
from verl.data_tools.compare.gap import Gap, measure_gap
from verl.data_tools.compare.loss import Difficulty, check_student
from verl.data_tools.compare.overlap import Overlap, find_overlap
from verl.data_tools.compare.sizes import Sizes, compare_sizes
from verl.data_tools.compare.statistics import Finding
from verl.data_tools.compare.style import Style, compare_styles
from verl.data_tools.compare.topics import Topics, find_topics
from verl.data_tools.compare.verdict import Ranked, rank
from verl.data_tools.compare.vocabulary import Unseen, find_unseen
from verl.data_tools.lengths.measure import Columns
from verl.data_tools.model import context_of, find_tokenization
from verl.models.loading import quiet_transformers
from verl.tools.command import check_device
from verl.utils.dataset.faults import TemplateCheck
from verl.utils.dataset.texts import Tokenization

WHAT = ("prompts", "answers")


@dataclass(frozen=True)
class Comparison:
    """What was found; None for what was not asked, or where texts do not allow it. vocabulary and told_apart by prompts
    and answers; findings ranked."""

    a: Side
    b: Side
    sizes: list[Sizes]
    vocabulary: dict[str, Unseen]
    topics: Topics | None
    told_apart: dict[str, ToldApart]
    overlap: Overlap
    styles: list[Style]
    difficulty: Difficulty | None
    gap: Gap | None
    accuracies: tuple[float, float] | None
    findings: list[Ranked]

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B."""
        return self.a.name, self.b.name


def compare(options: argparse.Namespace) -> Comparison:
    """As the flags say; all that can be wrong with them is found before any work.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    quiet_transformers()
    check_device(options.device)
    folders = dict.fromkeys(folder for folder in (options.model, options.student) if folder)
    tokenizations = {
        folder: find_tokenization(
            folder, options.apply_chat_template_kwargs, options.special_token_text, options.trust_remote_code
        )
        for folder in folders
    }
    if options.student:
        check_student(options.student)
    templates = [TemplateCheck(each.tokenizer, each.template_kwargs) for each in tokenizations.values()]
    names = _names(options)
    columns = Columns(options.prompt_key, options.teacher_key, options.on_bad_row)
    a, b = (
        read_side(name, files, columns, options.student_key, options.max_rows, options.seed, templates)
        for name, files in zip(names, (options.a, options.b), strict=True)
    )
    with tqdm(total=6 + bool(options.student) + bool(options.student_key), desc="compare", disable=None) as bar:
        return _compare(a, b, tokenizations, options, bar)


def _compare(
    a: Side, b: Side, tokenizations: dict[str, Tokenization], options: argparse.Namespace, bar: tqdm
) -> Comparison:
    def done(value: Any) -> Any:
        bar.update()
        return value

    seed, texts = options.seed, {"prompts": (a.prompts, b.prompts), "answers": (a.answers, b.answers)}
    lengths = done(_all_sizes(a, b, next(iter(tokenizations.values()), None)))
    unseen = done({what: find_unseen(*texts[what], seed) for what in WHAT})
    clusters = done(find_topics(a.prompts, b.prompts, options.topics, seed))
    tests = done({what: told_apart(a, b, texts[what], seed) for what in WHAT})
    shared = done(find_overlap(a, b))
    styles = done(compare_styles(a.answers, b.answers))
    difficulty = done(_difficulty(a, b, tokenizations[options.student], options)) if options.student else None
    tried = done(measure_gap(a, b, seed)) if options.student_key else None
    findings = _findings((a.name, b.name), lengths, unseen, clusters, tests, styles, difficulty)
    accuracies = tuple(options.d_acc) if options.d_acc else None
    return Comparison(
        a, b, lengths, unseen, clusters, tests, shared, styles, difficulty, tried, accuracies, rank(findings)
    )


def _names(options: argparse.Namespace) -> tuple[str, str]:
    if options.names:
        return tuple(options.names)
    names = name_of(options.a), name_of(options.b)
    return names if names[0] != names[1] else ("A", "B")


def _all_sizes(a: Side, b: Side, tokenization: Tokenization | None) -> list[Sizes]:
    found = [
        compare_sizes("prompts", "characters", *([len(text) for text in side.prompts] for side in (a, b))),
        compare_sizes("answers", "characters", *([len(text) for text in side.answers] for side in (a, b))),
    ]
    if tokenization is not None:
        prompts = (tokenization.prompts(side.messages) for side in (a, b))
        answers = (tokenization.answers(side.answers) for side in (a, b))
        found += [
            compare_sizes(what, "tokens", *([len(ids) for ids in rows] for rows in sides))
            for what, sides in (("prompts", prompts), ("answers", answers))
        ]
    return found


def _difficulty(a: Side, b: Side, tokenization: Tokenization, options: argparse.Namespace) -> Difficulty:
    model = loss.load_student(options.student, options.device, options.dtype, options.trust_remote_code)
    context = context_of(options.student, options.trust_remote_code)
    found = [
        loss.losses(
            model, tokenization, side, loss.drawn(side, options.loss_rows, options.seed), options.max_tokens, context
        )
        for side in (a, b)
    ]
    return loss.compare_losses(*found)


def _findings(
    names: tuple[str, str],
    lengths: Sequence[Sizes],
    unseen: dict[str, Unseen],
    clusters: Topics | None,
    tests: dict[str, ToldApart],
    styles: Sequence[Style],
    difficulty: Difficulty | None,
) -> list[Finding]:
    found = [sizes.finding(each, names) for each in lengths]
    found += [vocabulary.finding(what, result, names) for what, result in unseen.items()]
    found += [classifier.finding(what, result, names) for what, result in tests.items()]
    found += [style.finding(each, names) for each in styles]
    if clusters is not None:
        found.append(topics.finding(clusters, names))
    if difficulty is not None:
        found.append(loss.finding(difficulty, names))
    return found
