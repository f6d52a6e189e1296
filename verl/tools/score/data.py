"""Groups of a teacher's and a student's answers from files, and their tokens as the trainer makes them.

Nothing here needs a model: whatever is wrong with the data is found before one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from verl.tools.flags import ANSWER_KEYS
from verl.tools.prompts import Limits, Prompt, PromptAndAnswer, find_answer_key, fit_prompt, read_prompt
from verl.utils.dataset.faults import TemplateCheck, fault_of_columns, warn_of_ignored_tools
from verl.utils.dataset.rl_dataset import find_files, read_rows
from verl.utils.dataset.rows import Row, refuse
from verl.utils.dataset.texts import Tokenization
from verl.utils.dataset.tokenizer_checks import check_tokenizer


@dataclass(frozen=True)
class Group(Prompt):
    """A prompt with the teacher's answer and the student's answers, one or several."""

    answers: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_groups(
    data: Sequence[str],
    prompt_key: str = "content",
    teacher_key: str = "teacher_response",
    answer_key: str | None = None,
    prompt_files: Sequence[str] = (),
) -> list[Group]:
    """All rows of the parquet and jsonl files, checked.

    Args:
        prompt_key: chat messages, or a text that becomes one user message.
        answer_key: a text or a list of texts; None takes the first of ANSWER_KEYS that a file has.
        prompt_files: for files without prompts, whose rows have an `index` (the trainer's dumps of rollouts): the
            training files, in the trainer's order, to take prompts and teacher answers from.

    Raises:
        FileNotFoundError, ValueError: a file, a column or a row cannot be used; says where and what to pass.
    """
    rows = read_rows(find_files(data))
    if prompt_files:
        rows = _with_prompts(rows, read_rows(find_files(prompt_files)), teacher_key)
    groups: list[Group] = []
    faults: list[str] = []
    keys: dict[Any, str] = {}
    for row in rows:
        if row.path not in keys:
            keys[row.path] = _check_columns(row, prompt_key, teacher_key, answer_key)
        group = _group(row, prompt_key, teacher_key, keys[row.path])
        if isinstance(group, Group):
            groups.append(group)
        else:
            faults.append(f"{row.place}: {group}")
    refuse(
        faults,
        f"{len(faults)} of {len(rows)} rows cannot be scored",
        "Correct or leave out these rows, or name other columns: --prompt_key, --teacher_key, --answer_key",
    )
    return groups


def _with_prompts(rows: Sequence[Row], sources: Sequence[Row], teacher_key: str) -> list[Row]:
    """Each row over the row of the training data that its `index` names."""
    merged = []
    for row in rows:
        index = row.record.get("index")
        if type(index) is not int or not 0 <= index < len(sources):
            raise ValueError(
                f"{row.place}: expected an `index` from 0 to {len(sources) - 1} into the {len(sources)} rows of "
                f"--prompts, got {index!r}; pass all of data.train_files, or leave --prompts out if the rows have "
                "prompts"
            )
        source = sources[index].record
        if "teacher" in row.record and row.record["teacher"] != source.get(teacher_key):
            raise ValueError(
                f"{row.place}: its `teacher` is not the {teacher_key!r} of row {index} of --prompts, so they do not "
                "belong together; pass the data.train_files of that run, in the same order"
            )
        merged.append(Row(row.path, row.number, row.index, source | row.record))
    return merged


def _check_columns(row: Row, prompt_key: str, teacher_key: str, answer_key: str | None) -> str:
    """The file's column of student answers, seen from its first row; ValueError if a column is missing."""
    columns = f"the columns are {', '.join(map(repr, row.record))}"
    if prompt_key not in row.record:
        hint = ""
        if "index" in row.record:
            hint = "; for a dump of rollouts (trainer.rollout_data_dir) pass the files it was trained on with --prompts"
        elif "rouge" in row.record:
            hint = (
                "; a validation dump has its prompts as decoded text only, from which the tokens cannot be had back: "
                "put its answers beside the validation file's prompts"
            )
        raise ValueError(
            f"{row.path}: expected prompts in column {prompt_key!r}, {columns}; name the column with --prompt_key{hint}"
        )
    if teacher_key not in row.record:
        raise ValueError(
            f"{row.path}: expected the teacher's answers in column {teacher_key!r}, {columns}; name the column with "
            "--teacher_key"
        )
    found = find_answer_key(row.record, answer_key)
    if found is None:
        candidates = ANSWER_KEYS if answer_key is None else (answer_key,)
        raise ValueError(
            f"{row.path}: expected the student's answers in column {' or '.join(map(repr, candidates))}, {columns}; "
            "name the column with --answer_key"
        )
    return found


def _group(row: Row, prompt_key: str, teacher_key: str, answer_key: str) -> Group | str:
    """The row as a group, or why it is none."""
    prompt = read_prompt(row, prompt_key, teacher_key)
    if isinstance(prompt, str):
        return prompt
    fault = fault_of_columns(row.record, (answer_key,))
    if fault:
        return fault
    answers = row.record[answer_key]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        return f"{answer_key!r} is not a text or a list of texts but {answers!r:.40}"
    bad = next((number for number, answer in enumerate(answers) if not isinstance(answer, str)), None)
    if bad is not None:
        return f"answer {bad} in {answer_key!r} is not text but {type(answers[bad]).__name__}"
    return Group(row, prompt.messages, prompt.teacher, answers)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass
class TokenizedGroups:
    """Distinct prompts with answers, and which of them belongs to whom.

    Equal answers to equal prompts are one sequence, so that equal texts have equal scores to the last bit.
    """

    sequences: list[PromptAndAnswer] = field(default_factory=list)
    teachers: list[int] = field(default_factory=list)  # of each group
    students: list[list[int]] = field(default_factory=list)  # of each group
    cut_prompts: int = 0
    cut_answers: int = 0


def tokenize_groups(groups: Sequence[Group], tokenization: Tokenization, limits: Limits) -> TokenizedGroups:
    """Ids of all prompts and answers, as the trainer makes them.

    Prompts beyond `limits.prompt` are cut by `limits.truncation` or refused; answers beyond `limits.response` lose
    their end and EOS, as in training. Cuts are counted.

    Raises:
        ValueError: a prompt is too long with truncation "error", a sequence exceeds the model's context, or the
            tokenizer or its template refuses a row.
    """
    check_tokenizer(tokenization.tokenizer, tokenization.template_kwargs)
    template = TemplateCheck(tokenization.tokenizer, tokenization.template_kwargs)
    result = TokenizedGroups()
    seen: dict[PromptAndAnswer, int] = {}
    for group in groups:
        fault = template.fault(group.messages, group.teacher)
        if fault:
            raise ValueError(f"{group.place}: {fault}")
        try:
            (prompt,) = tokenization.prompts([group.messages])
            answers = tokenization.answers([group.teacher, *group.answers])
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"{group.place}: the tokenizer or its chat template refuses it ({error}); correct its text or roles"
            ) from error
        if not prompt or len(answers[0]) == 1:
            raise ValueError(f"{group.place}: the tokenizer makes no token of its {'teacher' if prompt else 'prompt'}")
        cut_prompt = fit_prompt(prompt, limits, group.place)
        result.cut_prompts += len(cut_prompt) < len(prompt)
        members = []
        cut_teacher = limits.response is not None and len(answers[0]) > limits.response
        for number, whole in enumerate(answers):
            answer = tuple(whole[: limits.response])
            result.cut_answers += len(answer) < len(whole)
            _check_context(cut_prompt, answer, limits, f"{group.place}, {_name(number)}")
            members.append(seen.setdefault(PromptAndAnswer(cut_prompt, answer, cut_teacher), len(seen)))
        result.teachers.append(members[0])
        result.students.append(members[1:])
    warn_of_ignored_tools(template.ignored_tools, len(groups))
    result.sequences = list(seen)
    return result


def _name(number: int) -> str:
    return f"answer {number - 1}" if number else "the teacher's answer"


def _check_context(prompt: tuple[int, ...], answer: tuple[int, ...], limits: Limits, place: str) -> None:
    total = len(prompt) + len(answer)
    if limits.context is not None and total > limits.context:
        raise ValueError(
            f"{place}: {len(prompt)} prompt and {len(answer)} answer tokens are {total}, more than the critic's "
            f"max_position_embeddings={limits.context}; leave the row out, or cut with --max_response_length, or with "
            "--max_prompt_length and --truncation"
        )
