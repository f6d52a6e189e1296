"""Generation: output tokens per second of the trainer's engine, with the sync check's log-probs and without.

    python -m benchmarks.rollout --shape 1.5b --out rollout.json
    python -m benchmarks.rollout --shape 0.5b --ways ours --set actor_rollout_ref.rollout.enforce_eager=True
    python -m benchmarks.rollout --shape 1.5b --ways ours --set actor_rollout_ref.rollout.kv_cache_dtype=fp8

128 prompts of 256 tokens, 8 answers each, 256 new tokens, up to 1,024 sequences at once. `ours` is the trainer's
engine, which takes and gives token ids; `classic` is a plain `vllm.LLM` on the same model folder with the same limits,
also in the trainer's own process, which reports the log-prob of every token and turns every answer into text. (The
folder's tokenizer covers the model's whole vocabulary, so that the text is as much work as with a real one.) The model
never writes EOS, and the tokens counted are those that came back. `start` is the time that the engine took to start.
`of_limit` is the time in which the weights and the keys and values, in the computation's precision, can be read, or the
products be computed, summed over the decoding steps, over the time measured. On a GPU each way gets a process of its
own. On CPU both are Hugging Face generation, for smoke tests.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.classic import ClassicHFRollout
from benchmarks.common import Report, device_limits, free_memory, in_processes, measure, parser, say
from benchmarks.engines import engine_settings, random_prompts, start_engine
from benchmarks.inputs import model_folder
from benchmarks.shapes import SHAPES, decode_limit_seconds
from verl.protocol import DataProto
from verl.trainer.config import Config
from verl.workers.rollout import ROLLOUTS

WAYS = ("ours", "classic")
COLUMNS = (
    "way",
    "start",
    "reported",
    "answers",
    "tokens",
    "full_length",
    "seconds",
    "tokens_per_s",
    "of_limit",
    "times_classic",
)
TEMPERATURE = 0.8
ENGINE_SHARE = 0.5


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    result.add_argument("--prompts", type=int, default=128)
    result.add_argument("--prompt-tokens", type=int, default=256)
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--new-tokens", type=int, default=256)
    result.add_argument("--max-num-seqs", type=int, default=1024, help="sequences at once")
    result.add_argument("--report", nargs="+", type=int, default=[2, 0], help="prompts whose log-probs ours reports")
    result.add_argument("--warmup", type=int, default=1, help="generations that are not timed")
    result.add_argument("--steps", type=int, default=3, help="generations that are timed")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the trainer's")
    return result


class RolloutBenchmark:
    """Times generation on one model folder."""

    def __init__(self, args: argparse.Namespace, report: Report, folder: Path):
        self.args, self.report, self.folder = args, report, folder
        self.shape = SHAPES[args.shape]
        self.prompts = random_prompts(self.shape, args.prompts, args.prompt_tokens)
        self.start = 0.0

    def ours(self) -> None:
        """The trainer's engine."""
        config, begun = self._settings(), time.monotonic()
        rollout, sampling = start_engine(config), config.actor_rollout_ref.rollout.sampling
        self._started(begun, "the trainer's")
        for reported in self.args.report:
            self._time(
                "ours", reported, lambda reported=reported: rollout.generate(self.prompts, sampling, 1, reported)
            )

    def classic(self) -> None:
        """A plain engine; its answers come as lists of ids with a log-prob for each."""
        config = self._settings()
        if config.actor_rollout_ref.rollout.name == "hf":
            ROLLOUTS["hf"] = f"{ClassicHFRollout.__module__}.{ClassicHFRollout.__name__}"
            rollout, sampling = start_engine(config), config.actor_rollout_ref.rollout.sampling
            return self._time("classic", self.args.prompts, lambda: rollout.generate(self.prompts, sampling, 1))
        # As for the trainer's engine: in this process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        args, begun = self.args, time.monotonic()
        llm = LLM(
            model=str(self.folder / "policy"),
            dtype=config.actor_rollout_ref.rollout.dtype,
            max_model_len=args.prompt_tokens + args.new_tokens,
            max_num_seqs=args.max_num_seqs,
            gpu_memory_utilization=ENGINE_SHARE,
        )
        self._started(begun, "a plain")
        params = SamplingParams(n=args.n, temperature=TEMPERATURE, max_tokens=args.new_tokens, logprobs=0)
        requests = [{"prompt_token_ids": ids} for ids in self.prompts.batch["input_ids"].tolist()]

        def generate() -> list:
            # The trainer's engine forgets the prompts of the last generation too: they were read with other weights.
            llm.reset_prefix_cache()
            return llm.generate(requests, params, use_tqdm=False)

        self._time("classic", args.prompts, generate)

    def _started(self, begun: float, whose: str) -> None:
        self.start = time.monotonic() - begun
        say(f"started {whose} engine in {self.start:.1f} s")

    def _settings(self) -> Config:
        args = self.args
        sizes = (args.prompt_tokens, args.new_tokens, args.n, args.max_num_seqs)
        return engine_settings(self.folder, args.device, *sizes, memory=ENGINE_SHARE, more=args.set)

    def _time(self, way: str, reported: int, generate: Callable[[], DataProto | list]) -> None:
        args, last = self.args, {}

        def keep() -> None:
            last["answers"] = generate()

        times = measure(args.device, keep, args.warmup, args.steps)
        lengths = answer_lengths(last["answers"])
        row = {
            "way": way, "start": self.start, "reported": reported, "answers": len(lengths), "tokens": sum(lengths),
            "full_length": sum(length == args.new_tokens for length in lengths) / len(lengths),
            "tokens_per_s": sum(lengths) / times["seconds"], **times,
        }  # fmt: skip
        limits = device_limits(args.device)
        if limits is not None:
            contexts = [args.prompt_tokens] * len(lengths)
            least = decode_limit_seconds(self.shape, limits, contexts, args.new_tokens, args.max_num_seqs)
            row["of_limit"] = least / times["seconds"]
        self.report.add(**row)


def answer_lengths(answers: DataProto | list) -> list[int]:
    """Tokens of every answer, of the trainer's engine or of vLLM's own output."""
    if isinstance(answers, DataProto):
        return answers.batch["response_mask"].sum(-1).flatten().tolist()
    return [len(answer.token_ids) for output in answers for answer in output.outputs]


def compare(report: Report) -> None:
    """Write into our rows how many times as many tokens per second they give as the classic way."""
    classic = [row["tokens_per_s"] for row in report.rows if row["way"] == "classic"]
    for row in report.rows:
        row["times_classic"] = row["tokens_per_s"] / classic[0] if classic and row["way"] == "ours" else None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    report = Report("rollout", args, COLUMNS)
    if args.device == "cuda" and len(args.ways) > 1:
        # What an engine leaves on the device must not stand in the next one's way.
        in_processes("benchmarks.rollout", argv, "--ways", args.ways, report)
    else:
        with model_folder(SHAPES[args.shape], args.device) as folder:
            say(f"wrote random models of shape {args.shape}")
            benchmark = RolloutBenchmark(args, report, folder)
            for way in args.ways:
                getattr(benchmark, way)()
                free_memory()
    compare(report)
    return report.finish()


if __name__ == "__main__":
    main()
