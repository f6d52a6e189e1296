"""The judge's work, in order: `command.py` has the command, `options.py` its flags, `answers.py` reads, `generate.py`
generates, `two_sample.py` (in `trials.py`), `pairwise.py` and `numbers.py` judge, `report.py` writes; `kept.py` keeps
what is found out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from verl.models.finding import check_files, is_discriminator
from verl.models.layers import compile_layers
from verl.models.loading import load_config
from verl.models.tokenizer import all_eos_token_ids, find_tokenizer, load_tokenizer
from verl.tools.command import check_device
from verl.tools.judge.answers import (
    TEACHER,
    Answer,
    Answers,
    Source,
    answer_ids,
    cut_flags,
    parse_sources,
    prompt_ids,
    read_answers,
    read_prompts,
    refuse_trained,
)
from verl.tools.judge.endpoint import Endpoint
from verl.tools.judge.generate import Drawing, Job, choose_engine, generate, kept_answers, prepare
from verl.tools.judge.kept import Kept, model_content
from verl.tools.judge.numbers import Numbers, numbers_of
from verl.tools.judge.pairwise import Match, Pairwise, compare
from verl.tools.judge.report import Verdict, check_plotting, plot, render, to_json, write_json
from verl.tools.judge.trials import two_sample
from verl.tools.judge.two_sample import Ids, Judge, JudgeSettings, TwoSample, make_pairs
from verl.tools.prompts import Limits, Prompt
from verl.utils.checkpoint.whole import refuse_pointers
from verl.utils.console import printable
from verl.utils.dataset.texts import Tokenization, eos_texts
from verl.utils.dataset.tokenizer_checks import check_tokenizer


def run(options: argparse.Namespace) -> str:
    """Judge and write; returns the report.

    Raises:
        OSError, ValueError: a user's error, as a sentence; all that can be seen beforehand before any work starts.
    """
    check_options(options)
    sources = parse_sources(options.student)
    _check_against(options.against, sources)
    endpoint = _endpoint(options)
    prompts, repeated = read_prompts(options.data, options.prompt_key, options.teacher_key)
    prompts = prompts[: options.max_prompts]
    _check_folds(options, prompts)
    refuse_trained(prompts, options.train_files, options.prompt_key)
    tokenization, prompt_tokens = _judges_tokens(options, prompts, sources)
    tokenizer = tokenization.tokenizer

    answers = {s.name: read_answers(s, prompts, options.prompt_key) for s in sources if not s.generates}
    answers[TEACHER] = [[Answer(prompt.teacher)] for prompt in prompts]
    ids = {name: answer_ids(texts, tokenization, options.max_response_length) for name, texts in answers.items()}
    drawing = _drawing(options)
    jobs = [prepare(s.name, s.path, prompts, drawing) for s in sources if s.generates]
    _check_context(options, prompt_tokens, ids, jobs)

    for name, texts in _generated(options.out, jobs, drawing, prompts).items():
        answers[name], ids[name] = texts, answer_ids(texts, tokenization, options.max_response_length)
    numbers = _numbers(answers, ids, prompts, tokenizer.eos_token_id)
    judged = [source.name for source in sources if source.name != options.against]
    tests = _two_samples(options, judged, prompt_tokens, ids, tokenizer) if options.judge_model else {}
    duels = _pairwise(options, endpoint, judged, prompts, answers) if endpoint else {}
    verdicts = {s.name: Verdict(numbers[s.name], tests.get(s.name), duels.get(s.name)) for s in sources}
    return _report(options, verdicts, numbers[TEACHER], prompts, repeated)


# ---------------------------------------------------------------------------------------------------------------------
# Before any work


def check_options(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine; ValueError for flags that cannot be, or not together."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {out}; name another")
    if options.plot:
        check_plotting()
    if options.temperature == 0 and options.samples > 1:
        raise ValueError(
            f"--samples: expected 1 with --temperature 0, whose answers are all alike, got {options.samples}; pass "
            "--samples 1, or a temperature"
        )
    if (options.endpoint is None) != (options.endpoint_model is None):
        raise ValueError("--endpoint and --endpoint_model: expected both or neither, got one; pass the other too")
    if options.ask == "closer" and options.against == "teacher":
        raise ValueError(
            "--ask closer: expected two students to compare, got --against teacher, whose answer is the measure; pass "
            "--against STUDENT"
        )


def _check_against(against: str, sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    if against not in (TEACHER, *names):
        raise ValueError(
            f"--against: expected {TEACHER} or one of {', '.join(names)}, got {against}; name one of these"
        )
    if names == [against]:
        raise ValueError(f"--against: expected another student beside {against}, got it alone; add --student NAME=...")


def _endpoint(options: argparse.Namespace) -> Endpoint | None:
    if options.endpoint is None:
        return None
    endpoint = Endpoint(
        options.endpoint, options.endpoint_model, options.endpoint_options, options.timeout, options.retries
    )
    endpoint.check()
    return endpoint


def _check_folds(options: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    if options.judge_model and len(prompts) < 2 * options.folds:
        raise ValueError(
            f"--folds: expected at least two prompts in each of {options.folds} folds, got {len(prompts)} prompts; "
            "pass more of them, or fewer --folds"
        )


def _judges_tokens(
    options: argparse.Namespace, prompts: Sequence[Prompt], sources: Sequence[Source]
) -> tuple[Tokenization, list[tuple[int, ...]]]:
    """What lengths are counted with, and the prompts in its tokens."""
    folders = [options.judge_model, options.tokenizer, *(str(s.path) for s in sources if s.generates)]
    folder = next((folder for folder in folders if folder), None)
    if folder is None:
        raise ValueError(
            "expected a tokenizer to count lengths with, got files of answers only; pass --tokenizer FOLDER, or the "
            "--judge_model that is to tell the students from the teacher"
        )
    if options.judge_model and is_discriminator(options.judge_model):
        raise ValueError(
            f"--judge_model: expected a language model, to which a fresh score head is given, got a discriminator in "
            f"{folder}, whose head has learned already; pass a base model or a checkpoint's actor folder"
        )
    refuse_pointers(find_tokenizer(folder))
    if options.judge_model:
        check_files(options.judge_model)
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    check_tokenizer(tokenizer)
    limits = Limits(options.max_prompt_length, None, options.truncation)
    ends = eos_texts(tokenizer, all_eos_token_ids(tokenizer, folder))
    tokenization = Tokenization(tokenizer, options.apply_chat_template_kwargs, ends, options.special_token_text)
    return tokenization, prompt_ids(prompts, tokenization, limits)


def _drawing(options: argparse.Namespace) -> Drawing:
    return Drawing(
        temperature=options.temperature,
        samples=options.samples,
        max_response_length=options.max_response_length,
        max_prompt_length=options.max_prompt_length,
        truncation=options.truncation,
        template_kwargs=options.apply_chat_template_kwargs,
        seed=options.seed,
        engine=choose_engine(options.engine, options.device),
        device=options.device,
        dtype=options.dtype,
        sequences=options.max_num_seqs,
        memory=options.gpu_memory_utilization,
        trust_remote_code=options.trust_remote_code,
        special_text=options.special_token_text,
    )


def _check_context(
    options: argparse.Namespace, prompts: Sequence[tuple[int, ...]], ids: dict[str, Ids], jobs: Sequence[Job]
) -> None:
    """Answers that are not there yet count with their limit."""
    if not options.judge_model:
        return
    config = load_config(options.judge_model, "score", trust_remote_code=options.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = {
        name: max(len(p) + len(answer) for p, row in zip(prompts, rows, strict=True) for answer in row)
        for name, rows in ids.items()
    }
    longest |= {job.name: max(map(len, prompts)) + options.max_response_length for job in jobs}
    for name, tokens in longest.items():
        if context is not None and tokens > context:
            raise ValueError(
                f"--judge_model: expected prompts and answers of at most max_position_embeddings={context} tokens "
                f"together, got {tokens} of {name}; lower --max_response_length, or cut prompts with "
                "--max_prompt_length and --truncation"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The work


def _generated(out: str, jobs: Sequence[Job], drawing: Drawing, prompts: Sequence[Prompt]) -> dict[str, Answers]:
    """Kept answers where there are, and new ones for the others."""
    folder = Path(out).expanduser() / "answers"
    found, missing = {}, []
    for job in jobs:
        found[job.name], says = kept_answers(folder, job, drawing)
        print(printable(says), file=sys.stderr)
        if found[job.name] is None:
            missing.append(job)
    generate(folder, missing, drawing, prompts)
    return found | {job.name: kept_answers(folder, job, drawing)[0] for job in missing}


def _numbers(
    answers: dict[str, Answers], ids: dict[str, Ids], prompts: Sequence[Prompt], eos_token_id: int
) -> dict[str, Numbers]:
    """Of every student, and of the teacher."""
    lengths = {name: [[len(answer) for answer in row] for row in rows] for name, rows in ids.items()}
    teacher_mean = sum(row[0] for row in lengths[TEACHER]) / len(prompts)
    teacher = [prompt.teacher for prompt in prompts]
    return {
        name: numbers_of(
            [[answer.text for answer in row] for row in rows],
            lengths[name],
            cut_flags(ids[name], eos_token_id),
            teacher,
            teacher_mean,
        )
        for name, rows in answers.items()
    }


def _two_samples(
    options: argparse.Namespace,
    names: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    ids: dict[str, Ids],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, TwoSample]:
    settings = JudgeSettings(
        options.judge_seeds, options.folds, options.judge_epochs, options.judge_batch_size, options.judge_lr,
        options.max_tokens,
    )  # fmt: skip
    known_by = {
        "model": model_content(options.judge_model),
        "settings": settings.shaping(),
        "computing": [options.dtype, torch.device(options.device).type, options.trust_remote_code],
    }
    kept = Kept(Path(options.out).expanduser() / "discriminators.jsonl")

    @cache
    def judge() -> Judge:
        return _judge(options, settings)

    tests = {}
    for name in names:
        pairs = make_pairs(prompts, ids[options.against], ids[name])
        tests[name] = two_sample(
            name, pairs, judge, settings, known_by=known_by, eos_token_id=tokenizer.eos_token_id, kept=kept
        )
    return tests


def _judge(options: argparse.Namespace, settings: JudgeSettings) -> Judge:
    judge = Judge(options.judge_model, settings, options.device, options.dtype, options.trust_remote_code)
    if options.device.startswith("cuda") and not options.no_compile:
        # Small models wait for the host, which has half as much to do for layers whose kernels are fused.
        compile_layers(judge.model.hf)
    return judge


def _pairwise(
    options: argparse.Namespace,
    endpoint: Endpoint,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    answers: dict[str, Answers],
) -> dict[str, Pairwise]:
    """Of each student's first answer to every prompt."""
    kept = Kept(Path(options.out).expanduser() / "verdicts.jsonl")
    results = {}
    for name in names:
        matches = [
            Match(number, prompt.messages, own[0].text, other[0].text, prompt.teacher)
            for number, (prompt, own, other) in enumerate(
                zip(prompts, answers[name], answers[options.against], strict=True)
            )
        ]
        results[name] = compare(
            matches[: options.pairwise_prompts], options.ask, endpoint, kept, options.concurrency, name
        )
    return results


def _report(
    options: argparse.Namespace,
    verdicts: dict[str, Verdict],
    teacher: Numbers,
    prompts: Sequence[Prompt],
    repeated: int,
) -> str:
    """Write the files; returns the text."""
    out = Path(options.out).expanduser()
    settings: dict[str, Any] = {**vars(options), "prompts": len(prompts), "repeated_prompts_left_out": repeated}
    write_json(out / "judge.json", to_json(verdicts, teacher, settings))
    written = [str(out / "judge.json")]
    if options.plot:
        plot(out / "judge.png", verdicts, teacher, options.against)
        written.append(str(out / "judge.png"))
    data = f"{len(prompts)} prompts of {', '.join(options.data)}"
    if repeated:
        data += f" ({repeated} rows that repeat a prompt left out)"
    if not options.train_files:
        data += "; whether students were trained on them was not checked (--train_files)"
    body = render(verdicts, teacher, options.against, options.ask)
    return "\n\n".join([data, body, f"wrote {' and '.join(written)}"])
