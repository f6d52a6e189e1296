"""The prompts that students are judged on, the teacher's answers, and answers of students that already lie in files.

Nothing here needs a model. Prompts are compared by their words (white space and system messages aside), so that a file
of answers finds its prompts whatever its order, and a prompt that was trained on is found whatever its system message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.tools.flags import ANSWER_KEYS, SUFFIXES
from verl.tools.prompts import (
    Limits,
    Prompt,
    as_messages,
    find_answer_key,
    fit_prompt,
    read_prompt,
)
from verl.utils.dataset.faults import TemplateCheck, fault_of_messages, fault_of_text, warn_of_ignored_tools
from verl.utils.dataset.rl_dataset import find_files, read_rows
from verl.utils.dataset.rows import Row, refuse
from verl.utils.dataset.texts import Messages, Tokenization

TEACHER = "teacher"


@dataclass(frozen=True)
class Answer:
    """An answer's text, and whether it was cut before it ended."""

    text: str
    cut: bool = False


Answers = list[list[Answer]]  # of each prompt, one or several


@dataclass(frozen=True)
class Source:
    """Where a student's answers come from: a model's folder, or a file's column (None: the first of ANSWER_KEYS)."""

    name: str
    path: Path
    column: str | None = None

    @property
    def generates(self) -> bool:
        """Whether its answers have to be generated."""
        return self.path.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def identity(messages: Messages) -> tuple[tuple[str, str], ...]:
    """What two prompts are compared by."""
    spoken = [message for message in messages if message["role"] != "system"] or messages
    return tuple((message["role"], " ".join(message["content"].split())) for message in spoken)


def read_prompts(data: Sequence[str], prompt_key: str, teacher_key: str) -> tuple[list[Prompt], int]:
    """The different prompts of the files, in order, and how many repeat an earlier one and are left out.

    Raises:
        FileNotFoundError, ValueError: a file, a column or a row cannot be used; says where and what to pass.
    """
    rows = read_rows(find_files(data))
    prompts: dict[Any, Prompt] = {}
    faults = []
    for row in rows:
        prompt = read_prompt(row, prompt_key, teacher_key)
        if isinstance(prompt, Prompt):
            prompts.setdefault(identity(prompt.messages), prompt)
        else:
            faults.append(f"{row.place}: {prompt}")
    refuse(
        faults,
        f"{len(faults)} of {len(rows)} rows cannot be judged on",
        "Correct or leave out these rows, or name other columns: --prompt_key, --teacher_key",
    )
    return list(prompts.values()), len(rows) - len(prompts)


def refuse_trained(prompts: Sequence[Prompt], train_files: Sequence[str], prompt_key: str) -> None:
    """ValueError if a prompt occurs in the training files: answers learned by heart would look like the teacher's."""
    trained: dict[Any, Row] = {}
    for row in read_rows(find_files(train_files)) if train_files else []:
        messages = as_messages(row.record.get(prompt_key))
        fault = fault_of_messages(messages, prompt_key)
        if fault:
            raise ValueError(f"--train_files: {row.place}: {fault}; name the column with --prompt_key")
        trained.setdefault(identity(messages), row)
    seen = [(prompt, trained[identity(prompt.messages)]) for prompt in prompts if identity(prompt.messages) in trained]
    refuse(
        [f"{prompt.place} is {row.place}" for prompt, row in seen],
        f"expected prompts that no student was trained on, got {len(seen)} of {len(prompts)} that are in --train_files",
        "Leave these rows out of --data, or pass prompts that were held out",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Students


def parse_source(text: str) -> Source:
    """NAME=FOLDER, NAME=FILE or NAME=FILE:COLUMN; ValueError says what was expected."""
    name, equals, rest = text.partition("=")
    if not equals or not rest or not name.replace("-", "_").replace(".", "_").isidentifier() or name == TEACHER:
        raise ValueError(
            f"--student: expected NAME=FOLDER or NAME=FILE[:COLUMN], NAME of letters, digits, '_', '-' and '.' from a "
            f"letter on and not {TEACHER!r}, got {text!r}"
        )
    path, column = Path(rest).expanduser(), None
    if not path.exists() and ":" in rest:
        before, _, column = rest.rpartition(":")
        path = Path(before).expanduser()
    if not path.is_dir() and path.suffix not in SUFFIXES:
        raise ValueError(
            f"--student {name}: expected a model's folder or a file that ends in {' or '.join(SUFFIXES)}, got {rest}, "
            "which is neither; correct the path"
        )
    return Source(name, path, column)


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """All students; ValueError for a name that is used twice."""
    sources = [parse_source(text) for text in texts]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--student: expected a name for each, got {', '.join(twice)} several times; rename one")
    return sources


def read_answers(source: Source, prompts: Sequence[Prompt], prompt_key: str) -> Answers:
    """The file's answers to each prompt, (P, one or several): by prompt where the file has prompts, otherwise by row.

    A column `cut` (true or false, or a list of them) or `finish_reason` ("length" for cut) says which did not end.

    Raises:
        FileNotFoundError, ValueError: the file or a row of it cannot be used, or a prompt has no answer in it.
    """
    rows = read_rows(find_files(source.path))
    flag = f"--student {source.name}"
    column = find_answer_key(rows[0].record, source.column)
    if column is None:
        candidates = ANSWER_KEYS if source.column is None else (source.column,)
        raise ValueError(
            f"{flag}: expected answers in column {' or '.join(map(repr, candidates))} of {source.path}, the columns "
            f"are {', '.join(map(repr, rows[0].record))}; name it: {source.name}={source.path}:COLUMN"
        )
    by_prompt = prompt_key in rows[0].record
    found: dict[Any, list[Answer]] = {}
    for row in rows:
        key = row.number
        if by_prompt:
            messages = as_messages(row.record.get(prompt_key))
            fault = fault_of_messages(messages, prompt_key)
            if fault:
                raise ValueError(f"{flag}: {row.place}: {fault}")
            key = identity(messages)
        found.setdefault(key, []).extend(_row_answers(row, column, flag))
    keys = [identity(prompt.messages) if by_prompt else prompt.row.index for prompt in prompts]
    missing = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in found]
    if missing:
        how = f"by {prompt_key!r}" if by_prompt else f"by row, as it has no column {prompt_key!r}"
        raise ValueError(
            f"{flag}: expected answers to all {len(prompts)} prompts of --data in {source.path} ({how}), got none to "
            f"{len(missing)}, the first being {missing[0].place}; pass answers to the same prompts"
        )
    return [found[key] for key in keys]


def _row_answers(row: Row, column: str, flag: str) -> list[Answer]:
    place = f"{flag}: {row.place}"
    texts = row.record.get(column)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: expected a text or texts in {column!r}, got {texts!r:.60}")
    fault = next(filter(None, (fault_of_text(text, f"an answer in {column!r}") for text in texts)), None)
    if fault:
        raise ValueError(f"{place}: {fault}")
    cut = row.record.get("cut")
    if cut is None:
        reasons = row.record.get("finish_reason")
        reasons = reasons if isinstance(reasons, list) else [reasons] * len(texts)
        cut = [reason == "length" for reason in reasons]
    cut = cut if isinstance(cut, list) else [cut]
    if len(cut) != len(texts) or not all(isinstance(value, bool) for value in cut):
        raise ValueError(f"{place}: expected {len(texts)} times true or false in 'cut' or a finish_reason, got {cut}")
    return [Answer(text, value) for text, value in zip(texts, cut, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def prompt_ids(prompts: Sequence[Prompt], tokenization: Tokenization, limits: Limits) -> list[tuple[int, ...]]:
    """Token ids of each prompt up to where the answer begins, cut or refused as `limits` say."""
    template = TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)
    faults = [(prompt.place, template.fault(prompt.messages, prompt.teacher)) for prompt in prompts]
    faults = [f"{place}: {fault}" for place, fault in faults if fault]
    warn_of_ignored_tools(template.ignored_tools, len(prompts))
    name = tokenization.tokenizer.name_or_path
    refuse(
        faults,
        f"{len(faults)} of {len(prompts)} prompts cannot be put to the model in {name}",
        "Correct or leave out these rows",
    )
    whole = tokenization.prompts([prompt.messages for prompt in prompts])
    return [fit_prompt(ids, limits, prompt.place) for ids, prompt in zip(whole, prompts, strict=True)]


def answer_ids(answers: Answers, tokenization: Tokenization, limit: int | None) -> list[list[tuple[int, ...]]]:
    """Token ids of each answer with EOS behind one that ended; beyond `limit` tokens they lose their end and EOS.

    An empty answer is nothing but EOS.
    """
    tokens = iter(tokenization.answers([answer.text for row in answers for answer in row]))

    def ids_of(answer: Answer) -> tuple[int, ...]:
        ids = tuple(next(tokens))
        return ((ids[:-1] or ids) if answer.cut else ids)[:limit]

    return [[ids_of(answer) for answer in row] for row in answers]


def cut_flags(ids: Sequence[Sequence[tuple[int, ...]]], eos_token_id: int) -> list[list[bool]]:
    """Which answers have no EOS at their end."""
    return [[answer[-1] != eos_token_id for answer in row] for row in ids]
