"""Train and measure every student of the grammar world, over several seeds, on as many processes as asked for.

    python -m examples.grammar_world.run --out outputs/grammar_world --seeds 3 --workers 2 [--only PATTERN ...]

Each run of `plan.py` is one process on one core, without Ray, and leaves OUT/seedS/RUN/result.json with the measures of
`measures.py`; what has one is not run again, so a stopped experiment goes on where it was. `report.py` makes the table
and the plots.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from examples.grammar_world.plan import COMMON, RUNS, Run

BY_NAME = {run.name: run for run in RUNS}


def result_file(out: Path, seed: int, name: str) -> Path:
    """Where a run's measures are, once it is done."""
    return out / f"seed{seed}" / name / "result.json"


def needed(patterns: list[str]) -> list[Run]:
    """The runs whose name matches a pattern, and those they start from."""
    wanted = {run.name for run in RUNS if any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)}
    for run in reversed(RUNS):
        if run.name in wanted:
            wanted |= run.parents
    return [run for run in RUNS if run.name in wanted]


def train_and_measure(out: Path, seed: int, run: Run) -> None:
    """One run, in this process."""
    import torch

    from examples.grammar_world.measures import measure
    from examples.grammar_world.world import World
    from verl.models.loading import load_model, quiet_transformers
    from verl.models.tokenizer import load_tokenizer
    from verl.trainer.config import compose_config
    from verl.trainer.in_process import run_in_process

    torch.set_num_threads(1)
    quiet_transformers()
    started = time.monotonic()
    home = out / f"seed{seed}"
    folder = home / run.name

    def source(parent: str, part: str) -> Path:
        if parent == "base":
            return home / "base"
        return home / parent / f"global_step_{BY_NAME[parent].steps}" / part

    models = [f"actor_rollout_ref.model.path={source(run.actor, 'actor')}"]
    if run.critic is not None:
        critic = source(run.critic, "critic")
        models.append(f"critic.model.path={critic if critic.exists() else source(run.critic, 'actor')}")
    run_in_process(
        compose_config(
            [
                *COMMON,
                *run.overrides,
                *models,
                f"data.train_files={home}/train.parquet",
                f"data.val_files={home}/test.parquet",
                f"data.seed={seed}",
                f"trainer.experiment_name={run.name}",
                f"trainer.default_local_dir={folder}",
                f"trainer.total_training_steps={run.steps}",
                f"trainer.save_freq={run.measured[0] if run.measured else -1}",
                "trainer.max_actor_ckpt_to_keep=null",
            ]
        )
    )
    trained = time.monotonic()
    world, tokenizer = World(seed), load_tokenizer(home / "base")
    students = {step: folder / f"global_step_{step}" / "actor" for step in run.measured}
    if run.name == "SeqKD":
        students = {0: home / "base", **students}
    curve = [
        {"step": step, **asdict(measure(load_model(path, "policy"), tokenizer, world, world.prompts("test")))}
        for step, path in students.items()
    ]
    times = {"training_seconds": trained - started, "measuring_seconds": time.monotonic() - trained}
    result_file(out, seed, run.name).write_text(json.dumps({"curve": curve, **times}, indent=1))


def build_world(out: Path, seed: int) -> None:
    """The data and the base student of one seed, unless they are there."""
    import torch

    from examples.grammar_world.build import build

    torch.set_num_threads(1)
    home = out / f"seed{seed}"
    if not (home / "built").exists():
        build(home, seed)
        (home / "built").touch()


def ready(waiting: list[tuple[int, Run]], done: set[tuple[int, str]]) -> Iterator[tuple[int, Run]]:
    """What can start now."""
    for seed, run in waiting:
        if all((seed, parent) in done for parent in run.parents):
            yield seed, run


def schedule(out: Path, seeds: list[int], runs: list[Run], workers: int) -> None:
    """Run everything that has no result yet, at most `workers` at a time; ends with the first failure's log."""
    waiting = [(seed, run) for run in runs for seed in seeds]
    done = {(seed, run.name) for seed, run in waiting if result_file(out, seed, run.name).exists()}
    waiting = [(seed, run) for seed, run in waiting if (seed, run.name) not in done]
    total, running = len(waiting), {}
    started = time.monotonic()
    while waiting or running:
        for seed, run in list(ready(waiting, done)):
            if len(running) >= workers:
                break
            waiting.remove((seed, run))
            running[seed, run.name] = _start(out, seed, run.name)
        for key, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[key]
            if process.returncode:
                for other in running.values():
                    other.kill()
                log = (out / f"seed{key[0]}" / f"{key[1]}.log").read_text()
                sys.exit(f"{key[1]} of seed {key[0]} failed:\n{log[-4000:]}")
            done.add(key)
            finished = total - len(waiting) - len(running)
            print(f"[{time.monotonic() - started:6.0f} s] {finished}/{total} seed {key[0]} {key[1]}", flush=True)
        time.sleep(0.2)


def _start(out: Path, seed: int, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "examples.grammar_world.run", "--out", str(out), "--one", str(seed), name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / f"seed{seed}" / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/grammar_world"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes at once")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of runs; * and ? allowed")
    parser.add_argument("--one", nargs=2, metavar=("SEED", "RUN"), help="this run alone, in this process")
    options = parser.parse_args()
    out = options.out.absolute()
    if options.one is not None:
        return train_and_measure(out, int(options.one[0]), BY_NAME[options.one[1]])
    runs = needed(options.only)
    if not runs:
        parser.error(f"no run matches {options.only}; there are {', '.join(BY_NAME)}")
    seeds = list(range(options.seeds))
    for seed in seeds:
        build_world(out, seed)
    schedule(out, seeds, runs, options.workers)


if __name__ == "__main__":
    main()
