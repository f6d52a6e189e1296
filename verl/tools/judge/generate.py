"""Students' answers from their model folders, by the trainer's own generation engines, kept for the next run.

Answers of NAME lie in answers/NAME.jsonl, with the prompts beside them, and what they were drawn with in
answers/NAME.settings.json: a run that wants the same takes them from there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl.config import RolloutConfig, SamplingConfig
from verl.models.finding import check_files, is_discriminator
from verl.models.loading import load_config, load_model, quiet_transformers
from verl.models.packing import padded
from verl.models.sharding import full_parameters
from verl.models.tokenizer import all_eos_token_ids, load_tokenizer
from verl.protocol import DataProto
from verl.tools.judge.answers import Answer, Answers, prompt_ids
from verl.tools.judge.kept import digest, model_content
from verl.tools.prompts import Limits, Prompt
from verl.utils.dataset.texts import SpecialText, Tokenization
from verl.utils.dataset.tokenizer_checks import check_tokenizer
from verl.utils.dump import write_jsonl
from verl.utils.progress import Progress
from verl.utils.rendezvous import meeting_store
from verl.workers.rollout import BaseRollout, get_rollout_class

# What tells configs of one architecture apart: where they lie, how they were saved, how answers end.
SAYS_NOTHING_OF_WEIGHTS = ("_name_or_path", "transformers_version", "dtype")
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn; `samples` to each prompt, `sequences` at once, `temperature` 0 for greedy."""

    temperature: float
    samples: int
    max_response_length: int
    max_prompt_length: int | None
    truncation: str
    template_kwargs: dict[str, Any]
    seed: int
    engine: str
    device: str
    dtype: str
    sequences: int
    memory: float
    trust_remote_code: bool
    special_text: SpecialText = "text"

    # What changes the answers no further than rounding and chance do, or by the prompts' ids alone.
    _FREE = ("engine", "device", "dtype", "sequences", "memory", "trust_remote_code", "special_text")

    def shaping(self) -> dict[str, Any]:
        """What answers that are to be taken again must have been drawn with."""
        return {key: value for key, value in asdict(self).items() if key not in self._FREE}


@dataclass(frozen=True)
class Job:
    """A student to be asked: its folder, its own token ids of the prompts, and the seed of its draws."""

    name: str
    path: Path
    prompts: list[tuple[int, ...]]
    seed: int


def choose_engine(name: str, device: str) -> str:
    """`auto` is vLLM on a GPU where it is installed; ValueError for a vLLM that is not."""
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ValueError("--engine: expected vllm to be installed, got no such package; pip install -e '.[gpu]', or hf")
    if name == "auto":
        return "vllm" if device.startswith("cuda") and installed else "hf"
    return name


def prepare(name: str, path: Path, prompts: Sequence[Prompt], drawing: Drawing) -> Job:
    """Everything that can be wrong with a student's folder, found before anything is generated.

    Raises:
        FileNotFoundError, ValueError: the folder holds no language model or is not whole, or prompt and answer exceed
            its context.
    """
    if is_discriminator(path):
        raise ValueError(f"--student {name}: expected a language model, got a discriminator in {path}; pass .../actor")
    check_files(path)
    tokenizer = load_tokenizer(path, drawing.trust_remote_code)
    check_tokenizer(tokenizer)
    limits = Limits(drawing.max_prompt_length, None, drawing.truncation)
    tokenization = Tokenization(tokenizer, drawing.template_kwargs, special_text=drawing.special_text)
    ids = prompt_ids(prompts, tokenization, limits)
    config = load_config(path, "policy", trust_remote_code=drawing.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, ids))
    if context is not None and longest + drawing.max_response_length > context:
        raise ValueError(
            f"--student {name}: the longest prompt has {longest} tokens and --max_response_length="
            f"{drawing.max_response_length} more are beyond the model's max_position_embeddings={context}; lower it, "
            "or cut prompts with --max_prompt_length and --truncation"
        )
    # By its name, so that two students with one model draw differently, whichever others are judged with them.
    return Job(name, path, ids, drawing.seed + zlib.crc32(name.encode()) % 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Kept answers


def _fingerprint(job: Job, drawing: Drawing) -> dict[str, Any]:
    """What the answers depend on."""
    return {"model": model_content(job.path), "prompts": digest(job.prompts), **drawing.shaping()}


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.jsonl", folder / f"{name}.settings.json"


def kept_answers(folder: Path, job: Job, drawing: Drawing) -> tuple[Answers | None, str]:
    """The answers of an earlier run that asked for the same, or None; and a sentence on what was found."""
    answers, settings = _paths(folder, job.name)
    if not (answers.is_file() and settings.is_file()):
        return None, f"asking {job.name} ..."
    earlier, wanted = json.loads(settings.read_text(encoding="utf-8")), _fingerprint(job, drawing)
    changed = [key for key, value in wanted.items() if earlier.get(key) != value]
    if changed:
        return None, f"asking {job.name} ...: {answers} is of another {', '.join(changed)} and is written anew"
    with answers.open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    return [
        [Answer(text, cut) for text, cut in zip(row["answers"], row["cut"], strict=True)] for row in rows
    ], f"answers of {job.name}: taken from {answers}"


def keep(folder: Path, job: Job, drawing: Drawing, prompts: Sequence[Prompt], answers: Answers) -> None:
    """Write the answers, and then what they are."""
    path, settings = _paths(folder, job.name)
    settings.unlink(missing_ok=True)
    write_jsonl(
        path,
        (
            {"content": prompt.messages, "answers": [a.text for a in row], "cut": [a.cut for a in row]}
            for prompt, row in zip(prompts, answers, strict=True)
        ),
    )
    settings.write_text(json.dumps(_fingerprint(job, drawing), indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def generate(folder: Path, jobs: Sequence[Job], drawing: Drawing, prompts: Sequence[Prompt]) -> None:
    """Answer all jobs' prompts and keep the answers; students of one architecture share an engine.

    vLLM runs in a process of its own, which gives all its memory back when it ends.
    """
    for group in _of_one_architecture(jobs, drawing.trust_remote_code):
        if drawing.engine == "hf":
            _generate_group(folder, group, drawing, prompts)
            continue
        child = multiprocessing.get_context("spawn").Process(
            target=_generate_alone, args=(folder, group, drawing, prompts)
        )
        child.start()
        child.join()
        if child.exitcode:
            names = ", ".join(job.name for job in group)
            raise ValueError(
                f"the vLLM process for {names} ended with {child.exitcode}, its own message is above; with too little "
                "memory lower --gpu_memory_utilization or --max_num_seqs, or pass --engine hf"
            )


def _of_one_architecture(jobs: Sequence[Job], trust_remote_code: bool) -> list[list[Job]]:
    """The jobs in groups whose models differ in weights alone, and in how their answers end."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        entries = load_config(job.path, "policy", trust_remote_code=trust_remote_code).to_dict()
        entries = {key: value for key, value in entries.items() if key not in (*SAYS_NOTHING_OF_WEIGHTS, *ENDS)}
        # Code of a folder's own may be another's under the same names.
        entries["code"] = [file.read_text(encoding="utf-8") for file in sorted(job.path.glob("*.py"))]
        groups.setdefault(json.dumps(entries, sort_keys=True, default=str), []).append(job)
    return list(groups.values())


def _generate_alone(folder: Path, jobs: Sequence[Job], drawing: Drawing, prompts: Sequence[Prompt]) -> None:
    """In a process of its own: a group of one rank, as the engine expects."""
    quiet_transformers()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if drawing.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(drawing.device).index or 0)
    backend = "cpu:gloo,cuda:nccl" if drawing.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=meeting_store(0, 1, timedelta(minutes=1)), rank=0, world_size=1)
    _generate_group(folder, jobs, drawing, prompts)


def _generate_group(folder: Path, jobs: Sequence[Job], drawing: Drawing, prompts: Sequence[Prompt]) -> None:
    first = jobs[0].path
    config = load_config(first, "policy", trust_remote_code=drawing.trust_remote_code)
    tokenizer = load_tokenizer(first, drawing.trust_remote_code)
    longest = max(len(ids) for job in jobs for ids in job.prompts)
    rollout = get_rollout_class(drawing.engine)(
        config, tokenizer, _rollout_config(drawing, longest), drawing.device, drawing.trust_remote_code
    )
    for job in jobs:
        model = load_model(job.path, "policy", trust_remote_code=drawing.trust_remote_code)
        rollout.push_weights(full_parameters(model))
        own = load_tokenizer(job.path, drawing.trust_remote_code)
        rollout.answer_in(own, all_eos_token_ids(own, job.path))
        keep(folder, job, drawing, prompts, _answer(rollout, job, drawing))


def _answer(rollout: BaseRollout, job: Job, drawing: Drawing) -> Answers:
    """Chunk by chunk, so that progress shows; vLLM likes larger ones."""
    tokenizer, ends = rollout.tokenizer, rollout.eos_token_ids
    at_once = drawing.sequences if drawing.engine == "hf" else 8 * drawing.sequences
    size = max(1, at_once // drawing.samples)
    answers: Answers = []
    with Progress(len(job.prompts), f"answers of {job.name}", "prompt") as progress:
        for start in range(0, len(job.prompts), size):
            part = job.prompts[start : start + size]
            prompts, prompt_mask = padded(part, left=True)
            batch = DataProto.from_dict({"input_ids": prompts, "attention_mask": prompt_mask})
            drawn = rollout.generate(batch, _sampling(drawing), job.seed + start).batch
            for ids, mask in zip(drawn["responses"], drawn["response_mask"].bool(), strict=True):
                tokens = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
                cut = [row[-1] not in ends for row in tokens]
                tokens = [row if is_cut else row[:-1] for row, is_cut in zip(tokens, cut, strict=True)]
                texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
                answers.append([Answer(*answer) for answer in zip(texts, cut, strict=True)])
            progress.update(len(part))
    return answers


def _sampling(drawing: Drawing) -> SamplingConfig:
    greedy = drawing.temperature == 0
    return SamplingConfig(drawing.samples, not greedy, drawing.temperature, top_p=1.0, top_k=-1)


def _rollout_config(drawing: Drawing, longest_prompt: int) -> RolloutConfig:
    sampling = _sampling(drawing)
    return RolloutConfig(
        name=drawing.engine,
        n=sampling.n,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        prompt_length=longest_prompt,
        response_length=drawing.max_response_length,
        seed=drawing.seed,
        max_model_len=None,
        max_num_seqs=drawing.sequences,
        sync_check_prompts=0,
        sync_check_tolerance=1.0,
        log_prob_use_dynamic_bsz=True,
        log_prob_max_token_len_per_gpu=8192,
        log_prob_micro_batch_size_per_gpu=None,
        val_kwargs=sampling,
        n_gpus_per_node=0,
        tensor_model_parallel_size=1,
        gpu_memory_utilization=drawing.memory,
        max_num_batched_tokens=8192,
        # Compiling and capturing take longer than they save in the answers to some hundred prompts.
        enforce_eager=True,
        kv_cache_dtype="auto",
        # The engine answers for one student after another, and ends with its process.
        free_cache_engine=False,
        enable_chunked_prefill=True,
        disable_log_stats=True,
        dtype=drawing.dtype,
    )
