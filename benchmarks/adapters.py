"""One whole GAD step with adapters through the real loop, on one frozen base or on two, beside that of all weights.

    python -m benchmarks.adapters --shape 7b --ways shared apart --out adapters.json
    python -m benchmarks.adapters --shape 1.5b --ways full shared 4bit

The step is that of `step`: 64 prompts of about 220 tokens with 8 answers of 256, KL to the reference, generation and
the push of the weights included. `shared`: student and discriminator train adapters on one frozen base in memory;
`apart`: each has a base of its own; `4bit`: one base, in 4 bits; `full`: all weights of both are trained. Seconds are
medians over the steps after the warm-up, in whose first step the student waits, because a discriminator with a fresh
score head may not reward it.
On a GPU each way gets a process of its own.

`peak_gib` is what PyTorch held at most, with the engine asleep; `engine_gib` the engine's share of the card, awake,
beside what rests then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import step
from benchmarks.common import Report, free_memory, in_processes, parser, say
from benchmarks.inputs import model_folder
from benchmarks.shapes import SHAPES
from verl.models.loading import load_config
from verl.models.shape import count_parameters
from verl.models.sharding import trained_adapters
from verl.models.shared_base import shares_base
from verl.trainer.config import Config
from verl.utils.units import GIB

WAYS = ("shared", "apart", "4bit", "full")
COLUMNS = (
    "shape", "way", "trained_millions", "step", *step.PASSES, *step.OVERHEAD, "tokens_per_s", "peak_gib", "engine_gib",
    "sync_gap",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--ways", nargs="+", choices=WAYS, default=["shared", "apart"])
    result.add_argument("--rank", type=int, default=32, help="of the adapters, of all linear layers")
    result.add_argument("--prompts", type=int, default=64, help="of one step")
    result.add_argument("--n", type=int, default=8, help="answers per prompt")
    result.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not counted, two or more")
    result.add_argument("--steps", type=int, default=3, help="steps that are")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings, for every way")
    return result


def settings(args: argparse.Namespace, way: str, models: Path, folder: Path) -> Config:
    """The configuration of one way of training; data and metrics are in `folder`."""
    own = [
        # Adapters of both are beside one model's layers; its score head is fresh.
        f"critic.model.path={models / 'policy'}",
        "trainer.critic_warmup=1",
        f"actor_rollout_ref.model.lora_rank={args.rank}",
        f"critic.model.lora_rank={args.rank}",
        f"actor_rollout_ref.model.load_in_4bit={way == '4bit'}",
        f"critic.model.load_in_4bit={way == '4bit'}",
        f"critic.model.share_base={way != 'apart'}",
    ]
    chosen = argparse.Namespace(**vars(args) | {"ranks": 1, "set": [*(own if way != "full" else []), *args.set]})
    return step.settings(chosen, "ours", models, folder)


def trained_parameters(config: Config) -> int:
    """Of student and discriminator together."""
    return sum(
        count_parameters(load_config(model.path, kind, model.override_config), kind, adapters=trained_adapters(model))
        for model, kind in ((config.actor_rollout_ref.model, "policy"), (config.critic.model, "score"))
    )


def time_step(args: argparse.Namespace, way: str, report: Report) -> None:
    """Train for a few steps one way, and report."""
    with model_folder(SHAPES[args.shape], args.device) as models, tempfile.TemporaryDirectory() as name:
        say(f"{way}: wrote random models of shape {args.shape}")
        folder = Path(name)
        config = settings(args, way, models, folder)
        trained, shared = trained_parameters(config), shares_base(config.actor_rollout_ref, config.critic)
        step.train(config, "gad", "ours")
        lines = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    share = config.actor_rollout_ref.rollout.gpu_memory_utilization
    card = torch.cuda.get_device_properties(0).total_memory / GIB if args.device == "cuda" else None
    row: dict[str, Any] = {"shape": args.shape, "way": way, "trained_millions": trained / 1e6, "one_base": shared}
    report.add(**row, **step.summarize(lines, args.warmup), engine_gib=None if card is None else share * card)
    free_memory()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    if args.warmup < 2:
        arguments().error(
            "the student waits in the first step, and nothing is pushed in the second: --warmup 2 or more"
        )
    report = Report("adapters", args, COLUMNS)
    if args.device == "cuda" and len(args.ways) > 1:
        # What an engine leaves on the device must not stand in the next one's way.
        in_processes("benchmarks.adapters", argv, "--ways", args.ways, report)
    else:
        for way in args.ways:
            time_step(args, way, report)
    return report.finish()


if __name__ == "__main__":
    main()
