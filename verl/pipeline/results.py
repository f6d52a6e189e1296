"""What is made of the stages: merged students, the judge's verdict, a report; each only if missing or stale."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from verl.config.run import Config
from verl.model_merger import merge
from verl.model_merger.cli import DEFAULT_DTYPE
from verl.models.content import Content, content_of_model
from verl.models.loading import load_config
from verl.models.shape import ModelShape
from verl.monitor.reading import METRICS_FILE, NotARun, read_run
from verl.monitor.report.document import see
from verl.monitor.report.page import write_page
from verl.monitor.report.provenance import RECORD_FILE
from verl.monitor.rules import load_rules
from verl.monitor.verdict import Words
from verl.pipeline.options import AUTO, DISCRIMINATORS
from verl.pipeline.preflight import listed
from verl.pipeline.processes import Processes
from verl.pipeline.state import read_json, write_json
from verl.tools.judge.answers import read_prompts
from verl.utils.checkpoint.checksums import checksums_of

STUDENTS, JUDGE, REPORT = "students", "judge", "report.html"
# A smaller model, or a longer wait, is no use as a judge.
JUDGES_PARAMETERS = 100e6
FOLDS = 5


@dataclass(frozen=True)
class Student:
    """A model to be judged: its name, where it is to be found, and what is in it."""

    name: str
    folder: Path
    content: Content


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def merge_student(out: Path, stage: str, checkpoint: Path, trust_remote_code: bool) -> tuple[Path, bool]:
    """The student of a checkpoint as a Hugging Face folder, `students/STAGE`, in the type that `verl merge` writes; and
    whether it had to be made.

    `students/STAGE.json` says what is in that folder: it goes before the folder does, and comes after it.
    """
    folder, note = out / STUDENTS / stage, out / STUDENTS / f"{stage}.json"
    made_of = {
        "checkpoint": f"{stage}/{checkpoint.name}",
        "weights": content_of_model(str(checkpoint / "actor")).digest,
        "dtype": DEFAULT_DTYPE,
    }
    if folder.is_dir() and read_json(note) == made_of:
        return folder, False
    part = folder.with_name(f"{stage}.part")
    note.unlink(missing_ok=True)
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, DEFAULT_DTYPE)
    merge(checkpoint / "actor", part, trust_remote_code=trust_remote_code, dtype=dtype)
    os.replace(part, folder)
    write_json(note, made_of)
    return folder, True


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def judges_by_discriminators(options: Namespace, config: Config, base: str) -> tuple[bool, str]:
    """Whether fresh discriminators are asked, and why or why not."""
    if options.judge_by != AUTO:
        return options.judge_by == DISCRIMINATORS, f"--judge_by {options.judge_by}"
    if config.trainer.device != "cuda":
        return False, "fresh discriminators take long on a CPU: --judge_by discriminators asks them all the same"
    model = config.actor_rollout_ref.model
    hf = load_config(base, "policy", model.override_config, model.trust_remote_code)
    parameters = ModelShape.of(hf, "policy", model.trust_remote_code).parameters
    if parameters < JUDGES_PARAMETERS:
        return False, f"{base} has {parameters / 1e6:.0f}M parameters, with which a discriminator tells little"
    prompts, _ = read_prompts(listed(config.data.val_files), config.data.prompt_key, config.data.response_key)
    if len(prompts) < 2 * FOLDS:
        return False, f"{len(prompts)} prompts are too few for fresh discriminators (300 or more are wanted)"
    return True, "fresh discriminators, which begin as the base model"


def judged_once(students: Sequence[Student]) -> tuple[list[Student], dict[str, str]]:
    """The students to be judged, and of each other one the earlier student whose weights it has: a warmup that trains
    the discriminator alone leaves the student as it was."""
    first: dict[int, Student] = {}
    for student in students:
        first.setdefault(student.content.digest, student)
    same = {each.name: first[each.content.digest].name for each in students}
    return list(first.values()), {name: earlier for name, earlier in same.items() if name != earlier}


def judge_arguments(
    config: Config, students: Sequence[Student], base: str, seeds: int, temperature: float, out: Path
) -> list[str]:
    """The judge's command line; `base`: the model that fresh discriminators begin with, empty without them; `seeds` of
    each."""
    data, model, rollout = config.data, config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    arguments = ["verl.tools.judge", "--data", *listed(data.val_files), "--train_files", *listed(data.train_files)]
    arguments += ["--out", str(out), "--temperature", f"{temperature:g}"]
    arguments += [] if temperature else ["--samples", "1"]
    arguments += ["--prompt_key", data.prompt_key, "--teacher_key", data.response_key]
    arguments += ["--max_response_length", str(data.max_response_length)]
    if data.truncation in ("left", "right"):
        arguments += ["--max_prompt_length", str(data.max_prompt_length), "--truncation", data.truncation]
    if data.val_max_samples > 0:
        arguments += ["--max_prompts", str(data.val_max_samples)]
    arguments += ["--apply_chat_template_kwargs", json.dumps(dict(data.apply_chat_template_kwargs))]
    arguments += ["--special_token_text", data.special_token_text]
    arguments += ["--device", config.trainer.device, "--engine", rollout.name]
    arguments += ["--trust_remote_code"] if model.trust_remote_code else []
    arguments += ["--judge_model", base, "--judge_seeds", str(seeds)] if base else []
    arguments += ["--no_compile"] if base and not config.actor_rollout_ref.actor.fsdp_config.use_torch_compile else []
    return [*arguments, *(part for each in students for part in ("--student", f"{each.name}={each.folder}"))]


def judge(
    processes: Processes, out: Path, config: Config, students: Sequence[Student], base: str, *, seeds: int,
    temperature: float, memory: float,
) -> tuple[int, dict[str, Any] | None]:  # fmt: skip
    """The judge's exit code and report, at one temperature; nothing is asked again where all is as it was. `memory` is
    vLLM's share of the device, on which no answer depends.

    `inputs.json` beside the report says what it is of, and comes last.
    """
    folder = out / JUDGE / f"at_{temperature:g}"
    report, note = folder / "judge.json", folder / "inputs.json"
    arguments = judge_arguments(config, students, base, seeds, temperature, folder)
    files = [Path(file).expanduser().absolute() for file in listed(config.data.val_files)]
    inputs = {
        "arguments": arguments,
        "students": {student.name: student.content.digest for student in students},
        "data": [checksums_of(file.parent, [file.name])[file.name] for file in files],
    }
    if read_json(note) == inputs and (found := read_json(report)) is not None:
        return 0, found
    note.unlink(missing_ok=True)
    code = processes.run(*arguments, "--gpu_memory_utilization", f"{memory:g}")
    if code == 0:
        write_json(note, inputs)
    return code, read_json(report) if code == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# The report


def write_report(out: Path, stages: Sequence[str]) -> dict[str, str]:
    """Each stage's health in a sentence; writes the page of all runs that left metrics, unless it is newer than they
    are."""
    rules, seen, health = load_rules(None), {}, {}
    for stage in stages:
        try:
            seen[stage] = see(out / stage, read_run(out / stage, None), rules)
        except (NotARun, OSError, ValueError) as error:
            health[stage] = f"not in the report: {error}"
    if not seen:
        return health
    page = out / REPORT
    files = [out / stage / name for stage in seen for name in (METRICS_FILE, RECORD_FILE)]
    newest = max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)
    note = out / f"{REPORT}.json"
    if not page.is_file() or page.stat().st_mtime_ns < newest or read_json(note) != {"stages": list(seen)}:
        part = page.with_suffix(".part")
        write_page(list(seen.values()), part)
        os.replace(part, page)
        write_json(note, {"stages": list(seen)})
    return health | {stage: Words(one.watch).verdict(one.run) for stage, one in seen.items()}
