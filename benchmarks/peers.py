"""The same work by TRL, where it is installed, next to ours: an SFT update, and a whole GRPO step with KL and vLLM.

    pip install trl
    python -m benchmarks.peers --shape 1.5b --out peers.json

Both train fp32 weights in bf16 on the same random model, with prompts and answers of the same lengths, no activation
recomputed, and AdamW. TRL's SFT runs on padded rows, drawn at random and grouped by length, which is the best it can do
without flash-attn (`--trl-dtype bfloat16` gives it bf16 weights and optimizer states, which ours does not have). Its
GRPO runs with vLLM in the same process (`vllm_mode="colocate"`). Ours are `benchmarks.update` and `benchmarks.step
--algorithm grpo`. Rewards are the same rule, which costs nothing. Every run gets a process of its own on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import step, update
from benchmarks.common import Report, free_memory, in_processes, parser, say, synchronize
from benchmarks.inputs import MIXED, TINY, Lengths, batch_of_tokens, model_folder, rows_of
from benchmarks.shapes import SHAPES
from verl.models.loading import load_tokenizer

RUNS = ("ours-sft", "trl-sft", "ours-grpo", "trl-grpo")
TRL_SAMPLING = {"trl padded": "random", "trl grouped": "group_by_length"}
COLUMNS = ("task", "who", "seconds", "tokens", "tokens_per_s", "peak_gib", "times_trl")
STEP_TOKENS, TINY_STEP_TOKENS = 131072, 1024
TEMPERATURE, KL_COEF = 0.8, 0.001


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    result.add_argument("--prompts", type=int, default=64, help="of one GRPO step")
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--tokens", type=int, default=32768, help="of a micro-batch of ours")
    result.add_argument("--trl-sft-rows", type=int, default=16, help="padded rows of a micro-batch of TRL's SFT")
    result.add_argument("--trl-grpo-rows", type=int, default=16, help="padded rows of a micro-batch of TRL's GRPO")
    result.add_argument("--trl-dtype", choices=["float32", "bfloat16"], default="float32", help="of TRL's weights")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    result.add_argument("--steps", type=int, default=3, help="steps that are timed")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def own_arguments(args: argparse.Namespace) -> list[str]:
    """What our benchmarks take over."""
    return [
        *("--shape", args.shape, "--device", args.device, "--ways", "ours", "--n", str(args.n)),
        *("--warmup", str(args.warmup), "--steps", str(args.steps)),
    ]


def ours_sft(args: argparse.Namespace, report: Report, models: Path) -> None:
    """SFT by `benchmarks.update`."""
    sizes = ["--tokens", str(args.tokens), "--step-tokens", str(STEP_TOKENS)]
    rows = update.main([*own_arguments(args), "--losses", "sft", *sizes])["results"]
    kept = {name: rows[0][name] for name in ("seconds", "tokens", "tokens_per_s", "peak_gib", "all_seconds", "mfu")}
    report.add(task="sft", who="ours", **kept)


def ours_grpo(args: argparse.Namespace, report: Report, models: Path) -> None:
    """GRPO by `benchmarks.step`."""
    sizes = ["--prompts", str(args.prompts), "--tokens", str(args.tokens)]
    (row,) = step.main([*own_arguments(args), *sizes, "--algorithm", "grpo"])["results"]
    kept = {name: row[name] for name in ("tokens_per_s", "peak_gib", "all_seconds", "response_length")}
    report.add(task="grpo", who="ours", seconds=row["step"], tokens=row["tokens_per_s"] * row["step"], **kept)


# ---------------------------------------------------------------------------------------------------------------------
# TRL


class StepClock(TrainerCallback):
    """Notes when each optimizer step has ended."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Called by the trainer."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())
        say(f"TRL's step {len(self.ends)}")

    def seconds(self, warmup: int) -> list[float]:
        """Of the steps after the first `warmup`, at least one: when the first began was not noted."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)][warmup - 1 :]


def trl_settings(args: argparse.Namespace, folder: str, rows: int, rows_of_a_step: int) -> dict[str, Any]:
    """What both of TRL's trainers are given."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": max(1, rows_of_a_step // rows),
        "max_steps": args.warmup + args.steps,
        "gradient_checkpointing": False,
        "bf16": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "model_init_kwargs": {"dtype": args.trl_dtype},
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_sft(args: argparse.Namespace, report: Report, models: Path) -> None:
    """SFTTrainer, once for each way of drawing rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tiny = args.shape == "tiny"
    lengths, budget = (TINY, TINY_STEP_TOKENS) if tiny else (MIXED, STEP_TOKENS)
    rows_of_a_step = len(batch_of_tokens(SHAPES[args.shape], "sft", args.n, lengths, budget))
    # As many rows as all steps draw: grouping by length needs some to choose from.
    steps = args.warmup + args.steps
    examples = sft_examples(args.shape, args.n, lengths, steps * budget)
    for who, sampling in TRL_SAMPLING.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = trl_settings(args, folder, args.trl_sft_rows, rows_of_a_step)
            config = SFTConfig(
                **settings, max_length=lengths.width, completion_only_loss=True, train_sampling_strategy=sampling
            )
            clock = StepClock(args.device)
            trainer = SFTTrainer(
                model=str(models / "policy"),
                args=config,
                train_dataset=Dataset.from_list(examples),
                processing_class=load_tokenizer(models / "policy"),
                callbacks=[clock],
            )
            tokens = count_tokens(trainer)
            trainer.train()
        per_step = config.gradient_accumulation_steps
        drawn = [sum(tokens[i : i + per_step]) for i in range(0, steps * per_step, per_step)][args.warmup :]
        seconds = clock.seconds(args.warmup)
        report.add(
            task="sft", who=who, seconds=median(seconds), tokens=sum(drawn) / len(drawn), all_seconds=seconds,
            tokens_per_s=median(t / s for t, s in zip(drawn, seconds, strict=True)), peak_gib=peak_gib(args.device),
        )  # fmt: skip
        del trainer
        free_memory()


def sft_examples(shape: str, n: int, lengths: Lengths, tokens: int) -> list[dict[str, list[int]]]:
    """Token ids with the answer marked."""
    rows = rows_of("sft", batch_of_tokens(SHAPES[shape], "sft", n, lengths, tokens))
    examples = []
    for prompt, prompt_mask, answer, answer_mask in zip(
        rows.prompts, rows.prompt_mask.bool(), rows.responses, rows.response_mask.bool(), strict=True
    ):
        ids, answered = prompt[prompt_mask].tolist(), answer[answer_mask].tolist()
        marks = [0] * len(ids) + [1] * len(answered)
        examples.append({"input_ids": ids + answered, "completion_mask": marks})
    return examples


def count_tokens(trainer: Any) -> list[int]:
    """A list that gets the real tokens of every micro-batch that the trainer collates."""
    tokens, collate = [], trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    return tokens


def trl_grpo(args: argparse.Namespace, report: Report, models: Path) -> None:
    """GRPOTrainer with vLLM in its process; on CPU it generates by itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    lengths = step.lengths_of(args)
    answers = args.prompts * args.n
    texts = [row["content"][0]["content"] for row in step.random_texts(4 * args.prompts, lengths, template_tokens=0)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **trl_settings(args, folder, min(args.trl_grpo_rows, answers), answers),
            num_generations=args.n,
            max_completion_length=lengths.answer[1],
            temperature=TEMPERATURE,
            beta=KL_COEF,
            use_vllm=args.device == "cuda",
            vllm_mode="colocate",
            vllm_max_model_length=lengths.width,
        )
        clock = StepClock(args.device)
        trainer = GRPOTrainer(
            model=str(models / "policy"),
            args=config,
            reward_funcs=even_shares,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=load_tokenizer(models / "policy"),
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.seconds(args.warmup)
    tokens = answers * (sum(map(len, texts)) / len(texts) + lengths.answer[1])
    report.add(
        task="grpo", who="trl", seconds=median(seconds), tokens=tokens, tokens_per_s=tokens / median(seconds),
        all_seconds=seconds, peak_gib=peak_gib(args.device),
    )  # fmt: skip


def even_shares(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The rule of `benchmarks.step`, for TRL."""
    return [step.even_share(ids) for ids in completion_ids]


def peak_gib(device: str) -> float | None:
    """The most device memory that torch had given out so far; starts to count anew."""
    if device == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


# ---------------------------------------------------------------------------------------------------------------------


def compare(report: Report) -> None:
    """Write into our rows how many times as fast as TRL's best they were, in tokens per second."""
    for task in ("sft", "grpo"):
        theirs = [row["tokens_per_s"] for row in report.rows if row["task"] == task and row["who"] != "ours"]
        for row in report.rows:
            if row["task"] == task and row["who"] == "ours" and theirs:
                row["times_trl"] = row["tokens_per_s"] / max(theirs)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    if importlib.util.find_spec("trl") is None and any(run.startswith("trl") for run in args.runs):
        sys.exit(
            "this benchmark compares with TRL, which is not installed: pip install trl, or pass --runs ours-sft ..."
        )
    if args.warmup < 1:
        arguments().error("--warmup must be at least 1: when TRL's first step begins is not noted")
    report = Report("peers", args, COLUMNS)
    if args.device == "cuda" and len(args.runs) > 1:
        # What an engine leaves on the device must not stand in the next one's way.
        in_processes("benchmarks.peers", argv, "--runs", args.runs, report)
    else:
        runs = {"ours-sft": ours_sft, "ours-grpo": ours_grpo, "trl-sft": trl_sft, "trl-grpo": trl_grpo}
        for run in args.runs:
            with model_folder(SHAPES[args.shape], args.device) as models:
                runs[run](args, report, models)
    compare(report)
    return report.finish()


if __name__ == "__main__":
    main()
