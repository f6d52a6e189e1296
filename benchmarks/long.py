"""Long rows: what a token costs in an SFT update of rows of 2k, 8k and 32k tokens, each rank with rows of its own or
several sharing them (`ulysses_sequence_parallel_size`).

    python -m benchmarks.long --shape 1.5b --out long.json
    python -m benchmarks.long --shape 7b --ranks 4 --sp 1 2 4 --lengths 32768 --recompute

All sizes are timed in one run, on the same processes, weights and rows: of each length as many rows as fill
`--step-tokens`, and at least one for each rank. A micro-batch has as many tokens on each rank at every size, or one
row.
`us_per_token` is microseconds of one GPU for a token, `of_alone` that over the first size's at the same length,
`of_shortest` over the same size's at the first length: attention grows with the square of a row's length, all else with
its tokens. `peak_gib` is the most that any rank held, `peak_of_alone` that over the first size's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Report, device_limits, measure, parser, say
from benchmarks.inputs import Lengths, base_overrides, compose, fast_overrides, model_folder, random_batch
from benchmarks.shapes import SHAPES, training_flops
from verl.batch import ANCHOR_COEF, PROMPT_KEYS, TEACHER_KEYS
from verl.models.sequence_parallel import own_shard
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.single_controller.ray.starting import join_or_start
from verl.workers.fsdp_workers import ACTOR, ActorRolloutRefWorker

COLUMNS = (
    "sp", "length", "rows", "tokens", "seconds", "us_per_token", "of_alone", "of_shortest", "mfu", "peak_gib",
    "peak_of_alone",
)  # fmt: skip
PEAK = "perf/max_memory_allocated_gb"


class Actor(ActorRolloutRefWorker):
    """The actor, whose ranks share the tokens of their rows as the benchmark says from time to time."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def share_tokens(self, size: int, rows: int, budget: int) -> None:
        """From now on groups of `size` ranks share tokens, a batch has so many rows, and a micro-batch so many tokens
        on each rank."""
        self.module.shard = own_shard(size)
        share, place = divmod(self.rank, size)
        self._places[ACTOR] = (share, place == 0)
        self.actor.config = replace(self.actor.config, ppo_mini_batch_size=rows, ppo_max_token_len_per_gpu=budget)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--ranks", type=int, default=2)
    result.add_argument("--sp", nargs="+", type=int, default=[1, 2], help="ranks that share the tokens of their rows")
    result.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="tokens of every row")
    result.add_argument("--tokens", type=int, default=16384, help="of a micro-batch on each rank, or one row's share")
    result.add_argument("--step-tokens", type=int, default=131072, help="of the rows of one optimizer step")
    result.add_argument("--recompute", action="store_true", help="layers' activations are computed again")
    result.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    result.add_argument("--steps", type=int, default=3, help="steps that are timed")
    return result


def start(args: argparse.Namespace, models: Path) -> WorkerGroup:
    """The ranks, each with its part of the actor."""
    config = compose(
        [
            "stage=seqkd",
            *base_overrides(models, args.device),
            *fast_overrides(args.device),
            "data.train_files=none",
            f"data.train_batch_size={args.ranks}",
            f"data.max_response_length={max(args.lengths)}",
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={2 * max(args.lengths) + 2048}",
            f"actor_rollout_ref.model.enable_gradient_checkpointing={args.recompute}",
            f"trainer.n_gpus_per_node={args.ranks}",
        ]
    )
    role = RayClassWithInitArgs(
        Actor, config.actor_rollout_ref, args.device, seed=1, total_steps=1000, use_reference=False, use_engine=False
    )
    join_or_start(None, None)
    pool = RayResourcePool([args.ranks], use_gpu=args.device == "cuda")
    group = RayWorkerGroup(pool, create_colocated_worker_cls({"actor": role})).spawn({"actor": role})["actor"]
    group.init_model()
    return group


def rows_of_length(args: argparse.Namespace, length: int) -> DataProto:
    """As many rows as fill a step, a multiple of the ranks, each of one token and an answer to it."""
    rows = max(1, args.step_tokens // length // args.ranks) * args.ranks
    batch = random_batch(SHAPES[args.shape], rows, 1, Lengths((1, 1), (length - 1, length - 1)))
    batch = batch.select(list(PROMPT_KEYS + TEACHER_KEYS))
    batch.meta_info[ANCHOR_COEF] = 0.0
    return batch


def time_updates(args: argparse.Namespace, group: WorkerGroup, size: int, batch: DataProto) -> dict[str, Any]:
    """The row of the report on updates with this batch."""
    length = int(batch.batch["teacher_attention_mask"].sum(-1)[0])
    group.share_tokens(size, len(batch), max(args.tokens, -(-length // size)))
    # It has asked the ranks where they stand.
    group._places.clear()
    group.peak_memory()
    # Whole updates come back, so that nothing is left on the ranks' devices.
    times = measure("cpu", lambda: group.update_actor(batch), args.warmup, args.steps)
    peaks = [report[PEAK] for report in group.peak_memory() if PEAK in report]
    tokens, limits = len(batch) * length, device_limits(args.device)
    mfu = None
    if limits is not None:
        done = training_flops(SHAPES[args.shape], [length] * len(batch))
        mfu = done / (times["seconds"] * limits.flops * args.ranks)
    return {
        "sp": size, "length": length, "rows": len(batch), "tokens": tokens, **times,
        "us_per_token": times["seconds"] * args.ranks / tokens * 1e6, "mfu": mfu,
        "peak_gib": max(peaks, default=None),
    }  # fmt: skip


def compared(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """A row's ratios to those of `rows` (itself among them) with the first size, and with the first length."""
    alone = next(other for other in rows if other["length"] == row["length"])
    shortest = next(other for other in rows if other["sp"] == row["sp"])
    return {
        "of_alone": row["us_per_token"] / alone["us_per_token"],
        "of_shortest": row["us_per_token"] / shortest["us_per_token"],
        "peak_of_alone": None if alone["peak_gib"] is None else row["peak_gib"] / alone["peak_gib"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    report = Report("long", args, COLUMNS)
    with model_folder(SHAPES[args.shape], args.device) as models:
        group = start(args, models)
        say(f"built the actor on {args.ranks} ranks")
        for size in args.sp:
            for length in args.lengths:
                row = time_updates(args, group, size, rows_of_length(args, length))
                report.add(**row, **compared(row, [*report.rows, row]))
    return report.finish()


if __name__ == "__main__":
    main()
