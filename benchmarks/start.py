"""The time from the command to the end of the first step, and what it goes to, with cold and with warm caches.

    python -m benchmarks.start --model /tmp/model --out results/start.json
    python -m benchmarks.start --shape 1.5b --runs gad --out results/start_1.5b.json
    python -m benchmarks.start --runs seqkd --against ../before

Every start is the command itself, in a process of its own: `python -m verl.trainer.main_ppo`, ended after its first
step, whose seconds are those that it keeps in `run.json`. `seqkd` generates nothing and has no engine; `seqkd_val`
validates before the first step; `gad` has everything on: discriminator, reference, engine, validation. A cold start
finds empty folders for what torch, Triton and vLLM compile and for what is known of the rows; the warm ones after it
find what it left there. Libraries and models stay in the system's memory, so that a first start on a machine takes
longer than either. With `--against` the package of another working tree starts in turn with this one's, each with
folders of its own, and `of_other` is this one's seconds over the other's. What a run prints is printed here, and every
start is a row as soon as it has ended, so that one which is cut short is not for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Report, parser, say
from benchmarks.engines import engine_name
from benchmarks.inputs import Lengths, in_memory, model_folder, write_critic
from benchmarks.shapes import BF16_BYTES, SHAPES
from benchmarks.step import random_texts
from verl.utils.dump import write_jsonl

# What a start does, by column: the phases of `run.json` whose names begin so. Rank 0's are parts of the driver's.
PHASES = {
    "settings": ("driver", "reading settings"),
    "libraries": ("driver", "loading libraries"),
    "checks": ("driver", "reading tokenizer"),
    "data": ("driver", "reading data"),
    "ray": ("driver", "starting Ray"),
    "ranks": ("driver", "starting "),
    "models": ("driver", "building models"),
    "engine": ("rank 0", "building the "),
    "proof": ("rank 0", "comparing "),
    "validation": ("driver", "validating"),
    "first_step": ("driver", "the first step"),
    "compiling": ("rank 0", "compiling layers"),
    "rank_libraries": ("rank 0", "loading libraries"),
    "rest": ("driver", "rest"),
}
COLUMNS = ("run", "tree", "caches", "seconds", "of_cold", "of_other", *PHASES)
THIS, OTHER = "this", "other"
NO_VALIDATION = ("trainer.val_before_train=False", "trainer.test_freq=-1")
RUNS = {
    "seqkd": ("stage=seqkd", *NO_VALIDATION),
    "seqkd_val": ("stage=seqkd",),
    "gad": ("stage=warmup", "trainer.critic_warmup=0", "actor_rollout_ref.actor.use_kl_loss=True"),
}
# A run ends with a checkpoint: weights and AdamW's states, in fp32, of two models, for each byte of a folder in bf16.
SAVED_BYTES = 2 * 12 // BF16_BYTES
# Where torch, Triton, vLLM and this package keep what they have made.
CACHES = ("VERL_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--model", type=Path, help="a language model's folder (default: a random one of the shape)")
    result.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    result.add_argument("--warm", type=int, default=3, help="starts with warm caches after the cold one (default: 3)")
    result.add_argument("--ranks", type=int, default=1)
    result.add_argument("--prompts", type=int, default=64, help="of a batch (default: 64)")
    result.add_argument("--n", type=int, default=8, help="answers to a prompt (default: 8)")
    result.add_argument("--tokens", type=int, nargs=2, default=(256, 256), help="longest prompt and answer")
    result.add_argument("--rows", type=int, default=2048, help="of the training data (default: 2048)")
    result.add_argument("--against", type=Path, metavar="TREE", help="another working tree, to compare with")
    result.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for the trainer")
    return result


def overrides(args: argparse.Namespace, model: Path, folder: Path, saved: Path, run: str) -> list[str]:
    """The settings of a start, whose run's folder is `saved`; the trainer's own defaults but for sizes and names."""
    critic = [f"critic.model.path={folder}/critic"] if run == "gad" else []
    return [
        *RUNS[run],
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/val.jsonl",
        f"data.train_batch_size={args.prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={args.prompts}",
        f"data.max_prompt_length={args.tokens[0]}",
        f"data.max_response_length={args.tokens[1]}",
        # Letters are tokens of the shapes' tokenizer; of a real one they are others, with a longer template.
        "data.truncation=left",
        f"actor_rollout_ref.model.path={model}",
        *critic,
        f"actor_rollout_ref.rollout.name={engine_name(args.device)}",
        f"actor_rollout_ref.rollout.n={args.n}",
        f"trainer.device={args.device}",
        f"trainer.n_gpus_per_node={args.ranks}",
        "trainer.total_training_steps=1",
        "trainer.experiment_name=start",
        f"trainer.default_local_dir={saved}",
        "trainer.logger=[file]",
        "trainer.resume_mode=disable",
        *args.set,
    ]


def start(settings: list[str], saved: Path, caches: Path, tree: Path) -> dict[str, Any]:
    """One start of a tree's package with these folders for the run and for caches; the seconds that it has kept."""
    shutil.rmtree(saved, ignore_errors=True)
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {name: str(caches / name.lower()) for name in CACHES}
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings]
    done = subprocess.run(command, cwd=tree, env=environment)
    if done.returncode:
        sys.exit(f"this ended with {done.returncode}, its output is above: {' '.join(command)}")
    return json.loads((saved / "run.json").read_text(encoding="utf-8"))["starts"][-1]["seconds_to_first_step"]


def row_of(seconds: dict[str, Any]) -> dict[str, float | None]:
    """The table's columns of a start's seconds; None for what it did not do. A phase counts in the first column that it
    fits."""
    row: dict[str, float | None] = {"seconds": seconds["total"]}
    taken = set()
    for column, (where, begins) in PHASES.items():
        names = {name for name in seconds[where] if name.startswith(begins) and (where, name) not in taken}
        taken |= {(where, name) for name in names}
        row[column] = sum(seconds[where][name] for name in names) if names else None
    return row


def median_row(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The start whose seconds are the median, the earlier of two."""
    return next(row for row in rows if row["seconds"] == statistics.median_low(row["seconds"] for row in rows))


def measure(args: argparse.Namespace, model: Path, run: str, report: Report) -> None:
    """One cold start and `--warm` warm ones, of each tree in turn."""
    # This one's comes second, so that there is something to hold it against.
    trees = ({} if args.against is None else {OTHER: args.against.resolve()}) | {THIS: ROOT}
    size = SAVED_BYTES * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with (
        tempfile.TemporaryDirectory(prefix="start-") as made,
        # Writing 35 GiB to a disk takes longer than the start; what is compiled is no good where nothing may be run.
        tempfile.TemporaryDirectory(prefix="start-", dir=in_memory(size)) as kept,
    ):
        folder, saved = Path(made), Path(kept) / "run"
        lengths = Lengths((args.tokens[0] // 2, args.tokens[0]), (args.tokens[1] // 2, args.tokens[1]))
        for name, rows in (("train", args.rows), ("val", args.prompts)):
            write_jsonl(folder / f"{name}.jsonl", random_texts(rows, lengths))
        write_critic(model, folder / "critic")
        settings = overrides(args, model, folder, saved, run)
        rows: dict[str, list[dict[str, float | None]]] = {name: [] for name in trees}
        for number in range(1 + args.warm):
            for name, tree in trees.items():
                caches = f"warm {number}" if number else "cold"
                say(f"{run}, {name}: {caches}, of {1 + args.warm} starts")
                rows[name].append(row_of(start(settings, saved, folder / f"caches-{name}", tree)))
                report.add(run=run, tree=name, caches=caches, **summed_up(rows, name, slice(number, None)))
    if args.warm > 1:
        for name in trees:
            report.add(run=run, tree=name, caches="warm, median", **summed_up(rows, name, slice(1, None)))


def summed_up(rows: dict[str, list[dict[str, float | None]]], name: str, chosen: slice) -> dict[str, float | None]:
    """The median of a tree's chosen starts, over its cold one if it is none of them; this one's over the other's."""
    row = dict(median_row(rows[name][chosen]))
    if chosen.start:
        row["of_cold"] = row["seconds"] / rows[name][0]["seconds"]
    if name == THIS and OTHER in rows:
        row["of_other"] = row["seconds"] / median_row(rows[OTHER][chosen])["seconds"]
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, and print the table of what it took."""
    args = arguments().parse_args(argv)
    report = Report("start", args, COLUMNS)
    if args.model is not None:
        for run in args.runs:
            measure(args, args.model, run, report)
    else:
        with model_folder(SHAPES[args.shape], args.device) as models:
            for run in args.runs:
                measure(args, models / "policy", run, report)
    return report.finish()


if __name__ == "__main__":
    main()
