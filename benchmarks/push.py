"""Bringing the engine to the policy's weights: what it takes, and that it works.

    python -m benchmarks.push --shape 1.5b --out push.json

The actor's own worker streams its FSDP2 shards into its engine, tensor by tensor, as after every update: the engine
gets its memory back (`wake`), every parameter is made whole in bf16 and copied (`push`), and before the next
generation the prefix cache is emptied (`reset`). `of_limit` compares wake and push with 4 N bytes at the device's
bandwidth: 2 N read and 2 N written. Then greedy answers are drawn with the weights, with other weights (every
tensor's rows moved by one), and with the first ones again: `changed` is the share of answers that other weights
changed, `restored` the share that came back, and both should be 1. On CPU the engine is Hugging Face generation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import Report, device_limits, parser, say, timed
from benchmarks.engines import engine_settings, random_prompts
from benchmarks.inputs import model_folder
from benchmarks.shapes import SHAPES, push_limit_seconds
from verl.config import SamplingConfig
from verl.models.sharding import full_parameters
from verl.protocol import DataProto
from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.local import LocalWorkerGroup
from verl.workers.fsdp_workers import ActorRolloutRefWorker

COLUMNS = ("seconds", "wake", "push", "reset", "sleep", "gib", "limit", "of_limit", "changed", "restored")
PARTS = ("wake", "push", "reset", "sleep")
GREEDY = SamplingConfig(n=1, do_sample=False, temperature=0.0, top_p=1.0, top_k=-1)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 32
ENGINE_SHARE = 0.3


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--warmup", type=int, default=2, help="pushes that are not timed")
    result.add_argument("--steps", type=int, default=5, help="pushes that are timed")
    return result


class PushBenchmark:
    """A worker with a policy and an engine."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.shape = args, SHAPES[args.shape]
        config = engine_settings(folder, args.device, PROMPT_TOKENS, NEW_TOKENS, 1, PROMPTS, memory=ENGINE_SHARE)
        role = ClassWithInitArgs(
            ActorRolloutRefWorker, config.actor_rollout_ref, args.device, seed=1, total_steps=1, use_reference=False
        )
        self.worker = LocalWorkerGroup(role).worker
        self.worker.init_model()
        self.prompts = random_prompts(self.shape, PROMPTS, PROMPT_TOKENS)

    def answers(self) -> torch.Tensor:
        """Greedy answers with the engine's present weights."""
        prompts = DataProto.from_dict(dict(self.prompts.batch.items()))
        return self.worker.rollout.generate(prompts, GREEDY, seed=1).batch["responses"].flatten(1)

    def check(self) -> dict[str, float]:
        """How many greedy answers follow the weights."""
        self.worker.push_weights()
        first = self.answers()
        dtype = getattr(torch, self.worker.config.rollout.dtype)
        moved = (
            (name, tensor.roll(1, dims=0)) for name, tensor in full_parameters(self.worker.actor.actor_module.hf, dtype)
        )
        self.worker.rollout.push_weights(moved)
        other = self.answers()
        self.worker.push_weights()
        again = self.answers()
        same, back = (first == other).all(-1).float(), (first == again).all(-1).float()
        return {"changed": 1 - same.mean().item(), "restored": back.mean().item()}

    def cycle(self) -> dict[str, float]:
        """Seconds of the parts of one cycle, from an engine that sleeps to one that sleeps."""
        rollout, device = self.worker.rollout, self.args.device
        parts = {"wake": timed(device, rollout.wake), "push": timed(device, self.worker.push_weights)}
        # The KV cache wakes with the first answers.
        self.answers()
        if hasattr(rollout, "llm"):
            parts["reset"] = timed(device, rollout.llm.reset_prefix_cache)
        return parts | {"sleep": timed(device, rollout.sleep)}

    def run(self) -> dict[str, Any]:
        """The report's row."""
        row = self.check()
        say(f"greedy answers: {row['changed']:.0%} changed with other weights, {row['restored']:.0%} came back")
        self.worker.rollout.sleep()
        cycles = [self.cycle() for _ in range(self.args.warmup + self.args.steps)][self.args.warmup :]
        parts = {part: median(cycle[part] for cycle in cycles) for part in PARTS if part in cycles[0]}
        row |= parts | {"seconds": parts["wake"] + parts["push"], "cycles": cycles}
        limits = device_limits(self.args.device)
        if limits is not None:
            least = push_limit_seconds(self.shape, limits)
            row |= {"limit": least, "of_limit": least / row["seconds"]}
        return row | {"gib": 2 * self.shape.parameters / 2**30}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    report = Report("push", args, COLUMNS)
    with model_folder(SHAPES[args.shape], args.device) as folder:
        say(f"wrote random models of shape {args.shape}")
        report.add(**PushBenchmark(args, folder).run())
    return report.finish()


if __name__ == "__main__":
    main()
