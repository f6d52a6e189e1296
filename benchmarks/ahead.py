"""GAD with answers written a step ahead, by engines on devices of their own, against answers written in turn.

Both have as many devices.

    python -m benchmarks.ahead --quickstart outputs/quickstart --ranks 2          # on CPU: learning too
    python -m benchmarks.ahead --shape 1.5b --ranks 2 --out results/ahead.json    # on GPUs: speed alone
    python -m benchmarks.ahead --shape 1.5b --ranks 4 --engines 2

Every run is the command itself, in a process of its own. `in turn` trains and writes on all ranks; `ahead` writes on
`--engines` of them and trains on the others, with `algorithm.rollout_is=token`; `ahead, not weighted` without it.
Tokens per second are those of all sequences over the median step, on all devices together; the first steps, which
compile, do not count. `gen_share` is the share of a step in which it generated, or waited for answers.

With `--quickstart`, a folder in which `python -m examples.quickstart.run` has ended, the runs are its GAD stage,
from its warmup's student and discriminator, on each of `--seeds` draws, and `exact` is the share of held-out prompts
that the merged student answers as the teacher could have, `gain` how far it is from the warmup's, `gain_std` the seeds'
spread. `of_turn` is the speed over that in turn, `gain_less_turn` the gain less that in turn, and `error` its standard
error over the seeds: a step's delay costs nothing where the one is within twice the other. A quick start of another
seed than 0 is told by `--world`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import ROOT, Report, parser, say
from benchmarks.engines import engine_name
from benchmarks.inputs import Lengths, model_folder
from benchmarks.shapes import SHAPES
from benchmarks.step import random_texts
from examples.quickstart.run import STAGES, grade, locate
from examples.quickstart.world import World
from verl.model_merger import merge
from verl.utils.command_line import for_children
from verl.utils.dump import write_jsonl

COLUMNS = ("way", "trains", "writes", "tokens_per_s", "of_turn", "step_s", "gen_share", "exact", "gain", "gain_std",
           "gain_less_turn", "error")  # fmt: skip
WEIGHTED = "algorithm.rollout_is=token"
# A run's own steps that are not counted: what is compiled, and the first batch, which nobody writes beside.
WARM_UP = 3
GAD = STAGES[-1]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--quickstart", type=Path, help="a finished quick start's folder (default: random models)")
    result.add_argument("--world", type=int, default=0, help="the quick start's --seed (default: 0)")
    result.add_argument("--ranks", type=int, default=2, help="devices of every way (default: 2)")
    result.add_argument("--engines", type=int, default=1, help="of them, those that write ahead (default: 1)")
    result.add_argument("--steps", type=int, help=f"of a run (default: 10, of a quick start {GAD.steps})")
    result.add_argument("--seeds", type=int, default=1, help="runs of each way, with other draws (default: 1)")
    result.add_argument("--prompts", type=int, default=64, help="of a batch (default: 64)")
    result.add_argument("--n", type=int, default=8, help="answers to a prompt (default: 8)")
    result.add_argument("--tokens", type=int, nargs=2, default=(256, 256), help="longest prompt and answer")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for the trainer")
    return result


def ways(args: argparse.Namespace) -> dict[str, list[str]]:
    """The settings of each way."""
    ahead = [
        f"trainer.n_gpus_per_node={args.ranks - args.engines}",
        f"actor_rollout_ref.rollout.n_gpus_per_node={args.engines}",
        "trainer.rollout_ahead=1",
    ]
    return {
        "in turn": [f"trainer.n_gpus_per_node={args.ranks}"],
        "ahead": [*ahead, WEIGHTED],
        "ahead, not weighted": ahead,
    }


def of_quick_start(out: Path) -> list[str]:
    """GAD from a quick start's warmup, as its stage script runs it."""
    return [
        "stage=gad",
        f"data.train_files={out}/train.parquet",
        f"data.val_files={out}/test.parquet",
        f"actor_rollout_ref.model.path={locate(GAD.model, out)}",
        f"critic.model.path={locate(GAD.reward_model, out)}",
        "data.max_prompt_length=24",
        "data.max_response_length=24",
        *GAD.overrides,
    ]


def of_random_models(args: argparse.Namespace, models: Path, folder: Path) -> list[str]:
    """GAD of random models on random texts, all of whose answers are as long as they may be."""
    lengths = Lengths((args.tokens[0] // 2, args.tokens[0]), (args.tokens[1] // 2, args.tokens[1]))
    write_jsonl(folder / "train.jsonl", random_texts(8 * args.prompts, lengths))
    return [
        "stage=gad",
        f"data.train_files={folder}/train.jsonl",
        "data.val_files=null",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={args.tokens[0]}",
        f"data.max_response_length={args.tokens[1]}",
        "data.truncation=left",
        f"actor_rollout_ref.model.path={models}/policy",
        f"critic.model.path={models}/critic",
        f"actor_rollout_ref.rollout.n={args.n}",
        # What a step does must not depend on the random discriminator's scores.
        "algorithm.cut_answers=keep",
        "critic.balance.enable=False",
        "trainer.total_epochs=1000",
    ]


def run(args: argparse.Namespace, settings: list[str], steps: int, seed: int) -> tuple[list[dict[str, float]], float]:
    """One run: what its steps have logged, and its student's share of exact answers (0 without a quick start)."""
    with tempfile.TemporaryDirectory(prefix="ahead-") as folder:
        common = [
            f"actor_rollout_ref.rollout.name={engine_name(args.device)}",
            f"actor_rollout_ref.rollout.seed={1000 * seed}",
            f"trainer.device={args.device}",
            f"trainer.total_training_steps={steps}",
            "trainer.test_freq=-1",
            "trainer.val_before_train=False",
            "trainer.save_freq=-1",
            "trainer.log_val_generations=0",
            "trainer.experiment_name=ahead",
            f"trainer.default_local_dir={folder}/run",
            "trainer.logger=[file]",
        ]
        if args.device == "cpu":
            common.append(f"ray_kwargs.ray_init.num_cpus={max(args.ranks, os.cpu_count() or 1)}")
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *common, *args.set]
        environment = os.environ | for_children()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        end = Path(folder, "run", f"global_step_{steps}", "actor")
        exact = exact_answers(args, end, Path(folder)) if args.quickstart else 0.0
    return [json.loads(line)["data"] for line in lines], exact


def exact_answers(args: argparse.Namespace, student: Path, folder: Path) -> float:
    """The share of the quick start's held-out prompts that the student of a checkpoint answers exactly."""
    merged = merge(student, folder / "merged")
    return grade(merged, World(args.world), pd.read_parquet(args.quickstart / "test.parquet")).exact


def speed(logged: list[dict[str, float]]) -> dict[str, float]:
    """Of the median step; `step` less what validation took of it."""
    steps = [data for data in logged if "timing_s/step" in data][WARM_UP:]
    seconds = statistics.median(data["timing_s/step"] for data in steps)
    waited = statistics.median(data.get("timing_s/gen", data.get("timing_s/gen_wait", 0.0)) for data in steps)
    tokens = statistics.median(data["perf/total_num_tokens"] / data["timing_s/step"] for data in steps)
    return {"step_s": seconds, "tokens_per_s": tokens, "gen_share": waited / seconds}


def learned(exact: list[float], before: float, in_turn: list[float] | None) -> dict[str, Any]:
    """What students have gained over `before`, and how that compares with the gains `in_turn`, as many."""
    gains = [share - before for share in exact]
    row: dict[str, Any] = {"exact": statistics.mean(exact), "gain": statistics.mean(gains), "gains": gains}
    row["gain_std"] = statistics.stdev(gains) if len(gains) > 1 else None
    if in_turn is not None:
        row["gain_less_turn"] = row["gain"] - statistics.mean(in_turn)
    if in_turn is not None and len(gains) > 1:
        row["error"] = ((statistics.variance(gains) + statistics.variance(in_turn)) / len(gains)) ** 0.5
    return row


def measure(args: argparse.Namespace, settings: list[str], report: Report) -> None:
    """Every way, each with every seed."""
    steps = args.steps or (GAD.steps if args.quickstart else WARM_UP + 7)
    first: dict[str, Any] = {}
    before = 0.0
    if args.quickstart:
        with tempfile.TemporaryDirectory(prefix="ahead-") as folder:
            before = exact_answers(args, locate(GAD.model, args.quickstart), Path(folder))
        say(f"before: {before:.1%} exact answers")
    for way, own in ways(args).items():
        runs, exact = [], []
        for seed in range(args.seeds):
            say(f"{way}: run {seed + 1} of {args.seeds}")
            logged, share = run(args, [*settings, *own], steps, seed)
            runs.append(logged)
            exact.append(share)
        speeds = [speed(logged) for logged in runs]
        row: dict[str, Any] = {name: statistics.median(one[name] for one in speeds) for name in speeds[0]}
        if args.quickstart:
            row |= learned(exact, before, first.get("gains"))
        first = first or row
        row["of_turn"] = row["tokens_per_s"] / first["tokens_per_s"]
        writes = args.ranks if way == "in turn" else args.engines
        report.add(way=way, trains=args.ranks - (0 if way == "in turn" else args.engines), writes=writes, **row)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, and print the table."""
    args = arguments().parse_args(argv)
    if not 0 < args.engines < args.ranks:
        sys.exit(f"--engines {args.engines}: expected 1 or more, and less than --ranks {args.ranks}: others train")
    report = Report("ahead", args, COLUMNS)
    if args.quickstart is not None:
        measure(args, of_quick_start(args.quickstart.absolute()), report)
    else:
        with model_folder(SHAPES[args.shape], args.device) as models, tempfile.TemporaryDirectory() as folder:
            measure(args, of_random_models(args, models, Path(folder)), report)
    return report.finish()


if __name__ == "__main__":
    main()
