"""The same work by upstream verl: its own commands, in processes of their own, timed by what they print.

Both packages are named `verl`, so upstream's lies in a folder of its own (`--peer-path`) with what it needs in other
versions than ours, and its process finds that folder and nothing of ours but the two files in `benchmarks/upstream`.
A GRPO step's seconds are upstream's own `timing_s/*`; its SFT has none, so a step there lasts from the line that the
console gets for one step to the next one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import step
from benchmarks.common import Report, say
from benchmarks.peers_common import KL_COEF, LEARNING_RATE, TEMPERATURE, sft_lengths, sft_rows
from verl.models.packing import AnswerRows

PACKAGES = ("verl", "vllm", "transformers", "tensordict", "flash_attn")
FOR_UPSTREAM = Path(__file__).parent / "upstream"
STEP_LINE = re.compile(r"\bstep:(\d+) - ")
# The chat template's marks: one before the question and one before the answer.
TEMPLATE_TOKENS = 2
EPOCHS = 1000  # more than the steps need
# Its GRPO's actors reserve a core of Ray's each, eight for what they store alone; without one they wait without a word.
RAY_CORES = 24
# What the runs' commands load.
MODULES = {"peer-sft": "verl.trainer.sft_trainer", "peer-grpo": "verl.trainer.main_ppo, vllm"}


class PeerError(RuntimeError):
    """Upstream's command has failed, or printed something else than it should."""


@dataclass(frozen=True)
class PeerRun:
    """What a run of upstream's has left.

    Attributes:
        metrics: of every step, by upstream's names.
        ends: when the console named each step, in seconds of one clock.
    """

    metrics: list[dict[str, float]]
    ends: list[float]

    def between(self, warmup: int) -> list[float]:
        """Seconds of the steps after the first `warmup`, at least one: when the first began nobody said."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)][warmup - 1 :]

    def medians(self, warmup: int) -> dict[str, float]:
        """Of every metric that all steps after the first `warmup` have."""
        counted = self.metrics[warmup:]
        names = set.intersection(*(set(line) for line in counted))
        return {name: median(line[name] for line in counted) for name in sorted(names)}


# ---------------------------------------------------------------------------------------------------------------------
# Before anything runs


def versions(folder: Path) -> dict[str, str]:
    """What lies in the peer's folder, of the packages that a result depends on."""
    found = {dist.metadata["Name"].replace("-", "_"): dist.version for dist in distributions(path=[str(folder)])}
    return {f"peer {name}": found[name] for name in PACKAGES if name in found}


def check(args: argparse.Namespace) -> None:
    """Stop where upstream is not there, or cannot do what is asked of it."""
    how = "make one with pip install --target DIR verl==0.9.1 vllm==0.24.0 ... and pass --peer-path DIR"
    if args.peer_path is None:
        sys.exit(f"--peer verl needs a folder with upstream verl unpacked, got none: {how}")
    if "peer verl" not in versions(args.peer_path):
        sys.exit(f"--peer-path {args.peer_path}: expected a folder with upstream verl, found none in it: {how}")
    if args.device == "cpu" and "peer-grpo" in args.runs:
        sys.exit("upstream verl generates with vLLM on a GPU alone: on CPU pass --runs ours-sft peer-sft")
    check_imports(args)


def check_imports(args: argparse.Namespace) -> None:
    """Stop where the commands that will be run cannot be loaded."""
    modules = [MODULES[run] for run in args.runs if run in MODULES]
    say(f"loading {', '.join(modules)} of {args.peer_path}, to see whether upstream can be run")
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-c", f"import {', '.join(modules)}"]
        environment = environment_of(args, Path(name))
        done = subprocess.run(command, env=environment, cwd=name, capture_output=True, text=True)
    if done.returncode:
        # What one package wants of another stands in the lines before the last.
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        sys.exit(f"--peer-path {args.peer_path}: upstream verl cannot be imported ({done.returncode}):\n{said}")


def attention(args: argparse.Namespace) -> str:
    """flash-attn where upstream finds it and there is a GPU for it, else what PyTorch has."""
    return "flash_attention_2" if args.device == "cuda" and _finds("flash_attn", args) else "sdpa"


def attention_told(args: argparse.Namespace) -> str:
    """As `attention`, and whose kernels they are."""
    return f"{attention(args)}{', kernels of PyTorch' if lacks_kernels(args) else ''}"


def lacks_kernels(args: argparse.Namespace) -> bool:
    """Whether flash-attn is there without its compiled half, for which `upstream/attention` stands in."""
    compiled = importlib.util.find_spec("flash_attn_2_cuda") or any(args.peer_path.glob("flash_attn_2_cuda*.so"))
    return attention(args) != "sdpa" and not compiled


def _finds(package: str, args: argparse.Namespace) -> bool:
    here = {dist.metadata["Name"].replace("-", "_") for dist in distributions()}
    return package in here or f"peer {package}" in versions(args.peer_path)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_sft_rows(path: Path, rows: AnswerRows, seed: int = 0) -> None:
    """Conversations of random letters whose prompts and answers have the lengths of `rows`, in tokens."""
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=tokens))

    messages = [
        [
            {"role": "user", "content": text(prompt - TEMPLATE_TOKENS)},
            {"role": "assistant", "content": text(answer)},
        ]
        for prompt, answer in zip(rows.prompt_mask.sum(-1).tolist(), rows.response_mask.sum(-1).tolist(), strict=True)
    ]
    pq.write_table(pa.table({"messages": messages}), path)


def write_prompts(path: Path, args: argparse.Namespace) -> None:
    """The prompts of `benchmarks.step`, with the columns that upstream wants."""
    texts = step.random_texts(4 * args.prompts, step.lengths_of(args), TEMPLATE_TOKENS)
    columns = {
        "prompt": [row["content"] for row in texts],
        "data_source": ["benchmark"] * len(texts),
        "reward_model": [{"style": "rule", "ground_truth": ""}] * len(texts),
        "extra_info": [{"index": index} for index in range(len(texts))],
    }
    pq.write_table(pa.table(columns), path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def model_settings(args: argparse.Namespace, rows: str) -> list[str]:
    """Of a model, without its place in the configuration: nothing recomputed, and the attention there is."""
    return [
        "enable_gradient_checkpointing=False",
        f"use_remove_padding={rows == 'packed'}",
        f"+override_config.attn_implementation={attention(args)}",
    ]


def placed(prefix: str, settings: list[str]) -> list[str]:
    """Settings under a prefix, which comes behind the `+` of those that the configuration does not have."""
    return [f"+{prefix}.{one[1:]}" if one.startswith("+") else f"{prefix}.{one}" for one in settings]


def trainer_settings(args: argparse.Namespace, folder: Path) -> list[str]:
    """What both of upstream's trainers are given."""
    return [
        f"trainer.total_training_steps={args.warmup + args.steps}",
        f"trainer.total_epochs={EPOCHS}",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "trainer.resume_mode=disable",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        f"trainer.device={args.device}",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=1",
        *args.peer_set,
    ]


def sft_command(args: argparse.Namespace, models: Path, folder: Path, rows: str, batch: int) -> list[str]:
    """Upstream's SFT on `folder/sft.parquet`, with `batch` rows to a step."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
        *("-m", "verl.trainer.sft_trainer"),
        f"data.train_files={folder / 'sft.parquet'}",
        f"data.train_batch_size={batch}",
        f"data.max_length={sft_lengths(args).width}",
        f"data.max_token_len_per_gpu={args.peer_tokens}",
        f"model.path={models / 'policy'}",
        *placed("model", model_settings(args, rows)),
        "engine.strategy=fsdp2",
        f"engine.use_torch_compile={args.device == 'cuda'}",
        f"optim.lr={LEARNING_RATE}",
        # The last step is saved whatever is asked: with nothing in it.
        "checkpoint.save_contents=[]",
        *trainer_settings(args, folder),
    ]


def grpo_command(args: argparse.Namespace, models: Path, folder: Path, rows: str) -> list[str]:
    """Upstream's GRPO on `folder/prompts.parquet`: the batch, lengths and losses of `benchmarks.step`."""
    lengths, actor = step.lengths_of(args), "actor_rollout_ref"
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder / 'prompts.parquet'}",
        f"data.val_files={folder / 'prompts.parquet'}",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={lengths.prompt[1]}",
        f"data.max_response_length={lengths.answer[1]}",
        f"{actor}.model.path={models / 'policy'}",
        *placed(f"{actor}.model", model_settings(args, rows)),
        f"{actor}.actor.strategy=fsdp2",
        f"{actor}.actor.optim.lr={LEARNING_RATE}",
        f"{actor}.actor.ppo_mini_batch_size={args.prompts}",
        f"{actor}.actor.use_dynamic_bsz=True",
        f"{actor}.actor.ppo_max_token_len_per_gpu={args.peer_tokens}",
        f"{actor}.actor.use_kl_loss=True",
        f"{actor}.actor.kl_loss_coef={KL_COEF}",
        f"{actor}.actor.kl_loss_type=low_var_kl",
        f"{actor}.rollout.name=vllm",
        f"{actor}.rollout.tensor_model_parallel_size=1",
        f"{actor}.rollout.n={args.n}",
        f"{actor}.rollout.temperature={TEMPERATURE}",
        f"{actor}.rollout.gpu_memory_utilization={step.ENGINE_SHARE}",
        f"{actor}.rollout.max_model_len={lengths.width}",
        f"{actor}.rollout.max_num_seqs={args.prompts * args.n}",
        f"reward.custom_reward_function.path={FOR_UPSTREAM / 'benchmark_reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.val_before_train=False",
        f"ray_kwargs.ray_init.num_cpus={max(RAY_CORES, os.cpu_count() or 1)}",
        *trainer_settings(args, folder),
    ]


def environment_of(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Upstream's: its own packages alone, metrics in `folder/metrics.jsonl`, and nothing looked up in the network."""
    folders = [args.peer_path.resolve(), FOR_UPSTREAM, *([FOR_UPSTREAM / "attention"] if lacks_kernels(args) else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "PYTHONUNBUFFERED": "1",
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
    }
    if args.device == "cpu":
        # The device is ours; the engine is the one that upstream has for a GPU.
        environment |= {"VERL_USE_EXTERNAL_MODULES": "benchmark_cpu_platform", "VERL_PLATFORM": "cpu"}
        environment |= {"VERL_ENGINE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def run(args: argparse.Namespace, command: list[str], folder: Path) -> PeerRun:
    """Run a command of upstream's to its end, in `folder`; what it prints goes to our own output.

    Raises:
        PeerError: it has failed, or fewer steps than it was to do are among its metrics.
    """
    say(" ".join(command))
    ends: dict[int, float] = {}
    environment = environment_of(args, folder)
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if named := STEP_LINE.search(line):
                ends.setdefault(int(named[1]), time.perf_counter())
    if process.returncode:
        raise PeerError(f"upstream's command ended with {process.returncode}; its output is above")
    metrics, steps = read_metrics(folder / "metrics.jsonl"), args.warmup + args.steps
    if len(metrics) < steps or len(ends) < steps:
        raise PeerError(f"expected {steps} steps, got metrics of {len(metrics)} and {len(ends)} on the console")
    return PeerRun(metrics[:steps], [ends[number] for number in sorted(ends)][:steps])


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of upstream's file logger, `{"step": N, "data": {name: value}}`, by step; none without a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line["data"] for line in sorted(lines, key=lambda line: line["step"])]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def sft_row(done: PeerRun, warmup: int) -> dict[str, Any]:
    """An SFT run as a row of the report."""
    seconds = done.between(warmup)
    tokens = [line["train/global_tokens"] for line in done.metrics[warmup:]]
    return {
        "seconds": median(seconds),
        "tokens": sum(tokens) / len(tokens),
        "tokens_per_s": median(t / s for t, s in zip(tokens, seconds, strict=True)),
        "peak_gib": done.medians(warmup).get("perf/max_memory_allocated_gb") or None,  # on CPU nobody counts
        "all_seconds": seconds,
        "losses": [line["train/loss"] for line in done.metrics],
    }


def grpo_row(done: PeerRun, warmup: int) -> dict[str, Any]:
    """A GRPO run as a row of the report, with the share of its step in which the engine gets the weights."""
    middle = done.medians(warmup)
    seconds, push = middle["timing_s/step"], middle.get("timing_s/update_weights")
    tokens = middle.get("perf/total_num_tokens")
    return {
        "seconds": seconds,
        "gen": middle.get("timing_s/gen"),
        "push": push,
        "push_share": None if push is None else push / seconds,
        "tokens": tokens,
        "tokens_per_s": None if tokens is None else tokens / seconds,
        "peak_gib": middle.get("perf/max_memory_allocated_gb"),
        "response_length": middle.get("response_length/mean"),
        "all_seconds": [line["timing_s/step"] for line in done.metrics[warmup:]],
        "console_seconds": done.between(warmup),
        "metrics": middle,
    }


def sft(args: argparse.Namespace, report: Report, models: Path) -> None:
    """Upstream's SFT, once for each way of laying rows out."""
    batch = len(sft_rows(args, 1))
    for rows in args.peer_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_sft_rows(folder / "sft.parquet", sft_rows(args, args.warmup + args.steps + 1))
            _report(args, report, "sft", rows, sft_command(args, models, folder, rows, batch), folder)


def grpo(args: argparse.Namespace, report: Report, models: Path) -> None:
    """Upstream's GRPO, once for each way of laying rows out."""
    for rows in args.peer_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_prompts(folder / "prompts.parquet", args)
            _report(args, report, "grpo", rows, grpo_command(args, models, folder, rows), folder)


def _report(args: argparse.Namespace, report: Report, task: str, rows: str, command: list[str], folder: Path) -> None:
    try:
        done = run(args, command, folder)
    except PeerError as error:
        # The other way of laying rows out may still run.
        say(f"verl {task}, {rows}: {error}")
        report.failures.append(f"verl {task}, {rows} rows")
        return
    row = (sft_row if task == "sft" else grpo_row)(done, args.warmup)
    report.add(task=task, who=f"verl {rows}", attention=attention_told(args), **row)
