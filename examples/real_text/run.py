"""Does adversarial training pay on real text? Train every student of `plan.py`, let judges tell them from the teacher.

    python -m examples.real_text.run --model STUDENT --train train.parquet --test test.parquet --out outputs/real_text

What it needs:
  - a pretrained chat model of a size to play with, as a Hugging Face folder (--model). The learning rates are those of
    a student of 135M parameters (SmolLM2-135M-Instruct);
  - prompts with a teacher's answers in the project's format (--train, --test): some thousands, of one teacher. 1,200 of
    the training rows (--judge_rows) and the test rows are put aside for the judge;
  - GPUs (--gpus, --per_gpu) with vLLM; on CPU it runs too, for trying it out, with --extra for a smaller everything.

OUT/seedS/RUN holds a run's checkpoints, metrics.jsonl and answers; OUT/seedS/judge its students' verdicts. What is done
is not done again, and a run that was stopped is resumed from its checkpoint. At the end `report.py` prints the table.
"""

from __future__ import annotations

import argparse
import fnmatch
import logging
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from examples.real_text.plan import BY_NAME, RUNS, Run
from examples.real_text.report import render
from examples.real_text.train import train_and_answer
from verl.utils.console import printable

VAL_ROWS = 128


def split(train: Path, test: Path, judge_rows: int, folder: Path) -> None:
    """`train`, `val` and `judge` rows that share no prompt, the same for every seed; unless they are there."""
    if (folder / "judge.parquet").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["content", "teacher_response"]
    rows = pd.read_parquet(train, columns=columns)
    texts = rows["content"].map(lambda messages: messages[-1]["content"])
    rows = rows[~texts.duplicated()]
    order = np.random.default_rng(0).permutation(len(rows))
    if len(rows) < judge_rows + 2 * VAL_ROWS:
        sys.exit(f"{train} has {len(rows)} different prompts: too few to put {judge_rows} aside (--judge_rows)")
    judge, val, rest = np.split(order, [judge_rows, judge_rows + VAL_ROWS])
    tested = pd.read_parquet(test, columns=columns)
    known = set(texts)
    tested = tested[[messages[-1]["content"] not in known for messages in tested["content"]]]
    rows.iloc[rest].to_parquet(folder / "train.parquet")
    rows.iloc[val].to_parquet(folder / "val.parquet")
    pd.concat([rows.iloc[judge], tested]).to_parquet(folder / "judge.parquet")


@dataclass
class Job:
    """A process to run: what it is called, what must be done before, how it starts, and where its output goes."""

    name: str
    needs: set[str]
    command: list[str]
    log: Path
    done: Callable[[], bool] = field(repr=False)


def work_through(jobs: list[Job], gpus: list[str], per_gpu: int, tries: int) -> list[str]:
    """Run the jobs that are not done, at most `per_gpu` on each GPU at a time, in their order as far as what they need
    allows; one that fails is tried again at the end of the line. Returns the names of those that failed for good or
    could not run."""
    done = {job.name for job in jobs if job.done()}
    waiting = [job for job in jobs if job.name not in done]
    slots = [gpu for _ in range(per_gpu) for gpu in gpus]
    running: dict[str, tuple[Job, subprocess.Popen, str]] = {}
    failed: list[str] = []
    left = dict.fromkeys((job.name for job in waiting), tries)
    started, total = time.monotonic(), len(waiting)
    while waiting or running:
        for job in [job for job in waiting if job.needs <= done]:
            if not slots:
                break
            waiting.remove(job)
            gpu = slots.pop(0)
            running[job.name] = (job, _start(job, gpu), gpu)
        for name, (job, process, gpu) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            slots.append(gpu)
            good = process.returncode == 0 and job.done()
            done |= {name} if good else set()
            left[name] -= 1
            again = not good and left[name] > 0
            waiting += [job] if again else []
            failed += [] if good or again else [name]
            finished = total - len(waiting) - len(running)
            state = "done" if good else f"FAILED ({'once more' if again else 'for good'}), see {job.log}"
            print(f"[{time.monotonic() - started:6.0f} s] {finished}/{total} {name}: {state}", flush=True)
        lost = [job.name for job in waiting if job.needs & set(failed)]
        failed += lost
        waiting = [job for job in waiting if job.name not in lost]
        time.sleep(0.5)
    return failed


def _start(job: Job, gpu: str) -> subprocess.Popen:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def training_jobs(options: argparse.Namespace, seed: int, runs: list[Run]) -> list[Job]:
    """A job for each run of one seed."""
    home = options.out / f"seed{seed}"
    repeated = ["--model", str(options.model), "--out", str(options.out), "--stop_at", str(options.stop_at)]
    jobs = []
    for run in runs:
        command = [sys.executable, "-m", "examples.real_text.run", *repeated, "--one", str(seed), run.name]
        needs = set() if run.parent is None else {f"seed{seed}/{run.parent}"}
        done = (home / run.name / "done").exists
        # Engines that share a GPU must not sleep: vLLM takes its neighbours' memory for its own when it wakes.
        shared = ["actor_rollout_ref.rollout.free_cache_engine=False"] if options.per_gpu > 1 else []
        extra = ["--extra", *shared, *options.extra] if shared or options.extra else []
        jobs.append(Job(f"seed{seed}/{run.name}", needs, command + extra, home / f"{run.name}.log", done))
    return jobs


def answers_of(home: Path, run: Run, which: str) -> list[Path]:
    """The files of a run's answers, by step; those of the `last` step, or `all`."""
    by_step = defaultdict(list)
    for file in sorted((home / run.name).glob("answers-*-at-*.parquet")):
        by_step[int(file.stem.split("-")[1])].append(file)
    steps = sorted(by_step)
    return [file for step in (steps if which == "all" else steps[-1:]) for file in by_step[step]]


def judging_jobs(options: argparse.Namespace, seed: int, runs: list[Run]) -> list[Job]:
    """A job for each set of answers of one seed."""
    home = options.out / f"seed{seed}"
    jobs = []
    for answers in [file for run in runs for file in answers_of(home, run, options.judged)]:
        step, temperature = answers.stem.removeprefix("answers-").split("-at-")
        name = f"{answers.parent.name}@{step}@{temperature}"
        verdict = home / "judge" / name
        command = [
            sys.executable, "-m", "verl.tools.judge",
            "--data", str(options.out / "data" / "judge.parquet"),
            "--train_files", str(options.out / "data" / "train.parquet"),
            "--student", f"{answers.parent.name}={answers}:text",
            "--out", str(verdict),
            "--judge_model", str(options.model),
            *options.judge,
        ]  # fmt: skip
        done = (verdict / "judge.json").exists
        jobs.append(Job(f"seed{seed}/judge/{name}", set(), command, home / "judge" / f"{name}.log", done))
    return jobs


def needed(patterns: list[str]) -> list[Run]:
    """The runs whose name matches a pattern, and those they start from."""
    wanted = {run.name for run in RUNS if any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)}
    for run in reversed(RUNS):
        if run.name in wanted and run.parent is not None:
            wanted.add(run.parent)
    return [run for run in RUNS if run.name in wanted]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the base student, which the judge and the discriminators start from")
    add("--train", type=Path, help="prompts and teacher answers")
    add("--test", type=Path, help="prompts and teacher answers that are not for training")
    add("--out", type=Path, default=Path("outputs/real_text"))
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of runs; * and ? allowed")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of data order, draws and fresh heads (default: 1 2 3)")
    add("--judge_rows", type=int, default=1200, help="of the training rows, put aside for the judge (default: 1200)")
    add("--gpus", nargs="*", default=[""], help="devices, as CUDA_VISIBLE_DEVICES names them (default: one, as it is)")
    add("--per_gpu", type=int, default=1, help="runs at a time on a GPU (default: 1)")
    add("--tries", type=int, default=2, help="of a run that fails, as those that share a GPU may (default: 2)")
    add("--extra", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every run")
    add("--judge", action="append", default=[], metavar="FLAG", help="a flag of verl.tools.judge: --judge=--folds=2")
    add("--judged", choices=("all", "last"), default="all", help="which of a run's answers (default: all)")
    parts = ("train", "judge")
    add("--parts", nargs="+", choices=parts, default=parts, help="what to do before the report (default: both)")
    add("--stop_at", type=float, default=float("inf"), help="seconds since 1970 after which no step begins")
    add("--one", nargs=2, metavar=("SEED", "RUN"), help="this run alone, in this process")
    options = parser.parse_args()
    options.out, options.model = options.out.absolute(), options.model.absolute()
    if options.one is None and (options.train is None or options.test is None):
        parser.error("--train and --test are needed")
    if options.one is None and not needed(options.only):
        parser.error(f"no run matches {options.only}; there are {', '.join(BY_NAME)}")
    return options


def main() -> None:
    """Split, train, judge, report."""
    options = parse()
    if options.one is not None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        seed, name = options.one
        home = options.out / f"seed{seed}"
        data = options.out / "data"
        return train_and_answer(name, data, home, options.model, int(seed), options.extra, options.stop_at)
    split(options.train, options.test, options.judge_rows, options.out / "data")
    runs, failed = needed(options.only), []
    for part, jobs_of in (("train", training_jobs), ("judge", judging_jobs)):
        if part in options.parts:
            jobs = [job for seed in options.seeds for job in jobs_of(options, seed, runs)]
            failed += work_through(jobs, options.gpus, options.per_gpu, options.tries)
    print(printable(render(options.out)))
    if failed:
        sys.exit(f"not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
