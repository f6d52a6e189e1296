"""Saving and resuming: how long a step is held, how long writing takes, and how long reading it again.

    python -m benchmarks.saving --shape 1.5b --out saving.json
    python -m benchmarks.saving --shape 7b --parts actor --ranks 2 --ways background --folder /data

The trainer's own workers and checkpoints, fp32 weights with AdamW's states, 12 bytes a parameter: written in the
foreground, then in the background (`trainer.async_save`) while SFT updates go on. `held` is what a step waits for,
`written` the time until the tracker names the checkpoint, `of_written` their ratio, `step` an update alone and
`step_during` one while a checkpoint is written, `held_steps` held over step, `reserve` what the start of a run waits
for, once. `resume` reads what was written, checksums included, as far as the system lets go of it first. All but `step`
grow with the bytes of a rank: with parameters, and with 1 / ranks where disk and memory keep up. One checkpoint is on
the disk at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Report, parser, say, timed
from benchmarks.inputs import MIXED, TINY, base_overrides, batch_of_tokens, compose, fast_overrides, model_folder
from benchmarks.shapes import SHAPES, Shape
from benchmarks.update import first_look
from verl.batch import ANCHOR_COEF
from verl.single_controller.base import WorkerGroup
from verl.single_controller.local import LocalWorkerGroup
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.single_controller.ray.starting import join_or_start
from verl.trainer.config import Config
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.utils.units import GIB
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

COLUMNS = (
    "way", "ranks", "gib", "held", "written", "of_written", "step", "step_during", "held_steps", "reserve", "resume",
)  # fmt: skip
WAYS = ("foreground", "background")


class Actor(ActorRolloutRefWorker):
    """The actor without an engine."""

    def _build_rollout(self) -> None:
        pass


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--parts", choices=["both", "actor"], default="both", help="actor and critic, or the actor")
    result.add_argument("--layers", type=int, help="decoder layers, for a size between two shapes")
    result.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of writing (default: both)")
    result.add_argument("--ranks", type=int, default=1, help="several are started by Ray")
    result.add_argument("--offload", action="store_true", help="models rest in host memory between updates (GPU)")
    result.add_argument("--tokens", type=int, default=16384, help="of an update, which is one micro-batch")
    result.add_argument("--steps", type=int, default=3, help="updates that are timed by themselves")
    result.add_argument("--saves", type=int, default=2, help="checkpoints each way; the last one counts")
    result.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    return result


class SavingBenchmark:
    """Models to be saved, and the folder that they are saved to."""

    def __init__(self, args: argparse.Namespace, shape: Shape, models: Path, folder: Path):
        self.args, self.folder = args, folder
        lengths = TINY if args.device == "cpu" else MIXED
        batch = first_look(batch_of_tokens(shape, "sft", 1, lengths, args.tokens))
        self.batch = batch[: len(batch) // args.ranks * args.ranks]
        self.batch.meta_info[ANCHOR_COEF] = 0.0
        self.config = self._settings(models, lengths.prompt[1], lengths.answer[1])
        self.groups = self._start()
        self.step_seconds = 0.0

    def _settings(self, models: Path, prompt: int, answer: int) -> Config:
        args = self.args
        offloaded = [
            f"{part}.fsdp_config.{what}_offload={args.offload}"
            for part in ("actor_rollout_ref.actor", "critic.model")
            for what in ("param", "optimizer")
        ]
        return compose(
            [
                "stage=seqkd",
                *base_overrides(models, args.device),
                *fast_overrides(args.device),
                *offloaded,
                "data.train_files=none",
                f"data.train_batch_size={len(self.batch)}",
                f"data.max_prompt_length={prompt}",
                f"data.max_response_length={answer}",
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={args.tokens}",
                f"trainer.n_gpus_per_node={args.ranks}",
            ]
        )

    def _start(self) -> dict[str, WorkerGroup]:
        config, args = self.config, self.args
        common = {"device": args.device, "seed": 1, "total_steps": 1000}
        roles = {"actor": RayClassWithInitArgs(Actor, config.actor_rollout_ref, use_reference=False, **common)}
        if args.parts == "both":
            roles["critic"] = RayClassWithInitArgs(CriticWorker, config.critic, **common)
        if args.ranks == 1:
            groups = {name: LocalWorkerGroup(role) for name, role in roles.items()}
        else:
            join_or_start(None, None)
            pool = RayResourcePool([args.ranks], use_gpu=args.device == "cuda")
            groups = RayWorkerGroup(pool, create_colocated_worker_cls(roles)).spawn(roles)
        for group in groups.values():
            group.init_model()
        return groups

    def update(self) -> None:
        """One optimizer step of the actor."""
        self.groups["actor"].update_actor(self.batch)

    def run(self, report: Report) -> None:
        """The ways asked for, and the update alone before."""
        self._timed(self.update)
        self.step_seconds = median(self._timed(self.update) for _ in range(self.args.steps))
        say(f"an update takes {self.step_seconds:.2f} s")
        for way in self.args.ways:
            report.add(**self._measure(way))

    def _timed(self, work: Callable[[], Any]) -> float:
        return timed(self.args.device if self.args.ranks == 1 else "cpu", work)

    def _measure(self, way: str) -> dict[str, Any]:
        root = self.folder / way
        settings = replace(self.config.trainer, default_local_dir=str(root), async_save=way == "background")
        checkpoints = Checkpoints(settings, self.groups["actor"], self.groups.get("critic"), {})
        row: dict[str, Any] = {"way": way, "ranks": self.args.ranks, "step": self.step_seconds}
        row["reserve"] = self._timed(checkpoints.reserve) if way == "background" else None
        say(f"{way}: memory for a copy is reserved" if row["reserve"] else f"{way}: no copy is made")
        for step in range(1, self.args.saves + 1):
            shutil.rmtree(root, ignore_errors=True)
            row |= self._save(checkpoints, RunState(step, 0, 0.0))
            say(f"{way}: a step was held for {row['held']:.2f} s of {row['written']:.1f} s")
        row["held_steps"], row["of_written"] = row["held"] / row["step"], row["held"] / row["written"]
        newest = root / f"global_step_{self.args.saves}"
        row["gib"] = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / GIB
        _let_go(newest)
        row["resume"] = self._timed(lambda: checkpoints.load(newest))
        shutil.rmtree(root)
        return row

    def _save(self, checkpoints: Checkpoints, state: RunState) -> dict[str, Any]:
        """Seconds of one checkpoint; where it is written in the background, of updates beside it."""
        begun, start = time.time(), time.perf_counter()
        checkpoints.write(state)
        held = time.perf_counter() - start
        say(f"the next step may begin after {held:.2f} s")
        checkpoints.publish(state)
        during = []
        while checkpoints.is_writing:
            during.append(self._timed(self.update))
        checkpoints.wait()
        tracker = checkpoints.root / "latest_checkpointed_iteration.txt"
        # The tracker is written before it gets its name, the last thing of all.
        written = tracker.stat().st_ctime - begun
        if not checkpoints.config.async_save:
            held = written
        return {"held": held, "written": written, "step_during": median(during) if during else None}


def _let_go(folder: Path) -> None:
    """Have the system forget what it holds of files, so that they are read from the disk."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    if args.device == "cpu":
        args.tokens = min(args.tokens, 256)
    shape = SHAPES[args.shape]
    if args.layers:
        shape = replace(shape, layers=args.layers)
    parts = 2 if args.parts == "both" else 1
    size = 12e-9 * parts * shape.parameters
    say(f"{shape.parameters / 1e9:.3f} billion parameters; a checkpoint of about {size:.1f} GB")
    report = Report("saving", args, COLUMNS)
    with (
        model_folder(shape, args.device) as models,
        tempfile.TemporaryDirectory(prefix="saving-", dir=args.folder) as folder,
    ):
        SavingBenchmark(args, shape, models, Path(folder)).run(report)
    return report.finish()


if __name__ == "__main__":
    main()
