"""The same work by TRL: SFT on padded rows, drawn in two ways, and GRPO with vLLM in the same process."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import step
from benchmarks.common import Report, free_memory, say, synchronize
from benchmarks.peers_common import KL_COEF, LEARNING_RATE, TEMPERATURE, sft_lengths, sft_rows
from verl.models.packing import AnswerRows
from verl.models.tokenizer import load_tokenizer

SAMPLING = {"trl padded": "random", "trl grouped": "group_by_length"}


def check(args: argparse.Namespace) -> None:
    """Stop where TRL is not installed."""
    if find_spec("trl") is None:
        sys.exit(
            "this benchmark compares with TRL, which is not installed: pip install trl, or pass --runs ours-sft ..."
        )


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


def settings_of(args: argparse.Namespace, folder: str, rows: int, rows_of_a_step: int) -> dict[str, Any]:
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
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def sft(args: argparse.Namespace, report: Report, models: Path) -> None:
    """SFTTrainer, once for each way of drawing rows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows_of_a_step = len(sft_rows(args, 1))
    # As many rows as all steps draw: grouping by length needs some to choose from.
    steps = args.warmup + args.steps
    examples = sft_examples(sft_rows(args, steps))
    for who, sampling in SAMPLING.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(args, folder, args.trl_sft_rows, rows_of_a_step)
            config = SFTConfig(
                **settings,
                max_length=sft_lengths(args).width,
                completion_only_loss=True,
                train_sampling_strategy=sampling,
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


def sft_examples(rows: AnswerRows) -> list[dict[str, list[int]]]:
    """Token ids with the answer marked."""
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


def grpo(args: argparse.Namespace, report: Report, models: Path) -> None:
    """GRPOTrainer with vLLM in its process; on CPU it generates by itself."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    lengths = step.lengths_of(args)
    answers = args.prompts * args.n
    texts = [row["content"][0]["content"] for row in step.random_texts(4 * args.prompts, lengths, template_tokens=0)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            **settings_of(args, folder, min(args.trl_grpo_rows, answers), answers),
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
