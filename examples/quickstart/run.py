"""The whole pipeline on a laptop: a tiny student learns from a made-up teacher in three stages, graded exactly.

    python -m examples.quickstart.run [--out outputs/quickstart]

It builds the world, its data and a base student that speaks the language (`tiny_model.py`), has `verl.data_tools` look
for what would spoil training, runs the three stage scripts as a user would run them on GPU nodes, merges each student,
and prints how well each answers held-out prompts.
What each stage is given beyond the script's own defaults stands in STAGES: a tiny model wants larger steps than 8B.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.world import World
from verl.model_merger import merge
from verl.models.loading import quiet_transformers
from verl.utils.command_line import for_children
from verl.utils.console import printable
from verl.utils.rouge import mean_rouge_l

REPOSITORY = Path(__file__).parents[2]
SHOWN_SAMPLES = 3
# Written last: {student: its grades}.
RESULTS = "results.json"
DATA_CHECK = "data_check.txt"
# Written first, so that what an earlier quick start has left is known again.
MARK = ".quickstart"
INTERRUPTED = 130


@dataclass(frozen=True)
class Stage:
    """One stage: its script, where its models come from, how many steps it takes and what it overrides."""

    name: str
    script: str
    model: str
    reward_model: str | None
    steps: int
    overrides: tuple[str, ...]
    # Of the steps, those that train the discriminator alone.
    frozen: float | None = None


# The actor takes small steps and the discriminator large ones, so that the student never outruns its judge.
ADVERSARIAL = (
    "critic.optim.lr=1e-3",
    "critic.optim.lr_warmup_steps=5",
    "actor_rollout_ref.actor.optim.lr=3e-5",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=5",
    # As many as it takes to tell a share of 0.6 from guessing.
    "critic.held_out_prompts=128",
)
STAGES = (
    Stage(
        "SeqKD", "gpt5-8b-SeqKD-gspo.sh", "base", None, 80,
        ("data.train_batch_size=64", "actor_rollout_ref.actor.optim.lr=1e-3"),
    ),
    Stage(
        "warmup", "gpt5-8b-warmup-gspo.sh", "SeqKD/actor", "SeqKD/actor", 90,
        (*ADVERSARIAL, "data.train_batch_size=32", "actor_rollout_ref.rollout.n=4"),
        frozen=8 / 9,
    ),
    Stage(
        "GAD", "gpt5-8b-gad-gspo.sh", "warmup/actor", "warmup/critic", 30,
        (*ADVERSARIAL, "data.train_batch_size=64"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a student did on the held-out prompts."""

    rouge: float
    fact: float
    style: float
    exact: float
    length: float
    samples: list[tuple[str, str]]


def locate(name: str, out: Path) -> Path:
    """The folder of a model: the base, or `actor`/`critic` of a stage's last checkpoint, as training left it."""
    if "/" not in name:
        return out / name
    stage, part = name.split("/")
    run = out / "checkpoints" / "gad" / stage
    step = (run / "latest_checkpointed_iteration.txt").read_text().strip()
    return run / f"global_step_{step}" / part


def call(command: list[str], **how: Any) -> int:
    """Run a command; returns its exit code. Ctrl-C is this process' alone to hear: it ends the command, and waits for
    that, before it goes on its way."""
    # Held back until there is a process to end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = subprocess.Popen(command, preexec_fn=_do_not_hear, **how)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _do_not_hear() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def is_quick_start(out: Path) -> bool:
    """Whether a folder is what an earlier quick start, stopped wherever it was, has left."""
    names = {file.name for file in out.iterdir()}
    return bool(names & {MARK, "base"}) or ("raw" in names and names <= {"raw", "train.parquet", "test.parquet"})


def check_data(out: Path) -> None:
    """Look for what would spoil training in the data, test prompts among it; the tool's report is kept."""
    if find_spec("datasketch") is None:
        print("data: not looked at, as datasketch is not installed: pip install -e '.[data]'", flush=True)
        return
    command = [sys.executable, "-m", "verl.data_tools.check", str(out / "train.parquet")]
    command += ["--against", str(out / "test.parquet"), "--model", str(out / "base")]
    with (out / DATA_CHECK).open("wb") as report:
        code = call(command, cwd=REPOSITORY, stdout=report)
    if code:
        sys.exit(printable((out / DATA_CHECK).read_text(encoding="utf-8")))
    print(f"data: nothing was found that would spoil training; the report is {out / DATA_CHECK}", flush=True)


def run_stage(stage: Stage, out: Path, ranks: int, device: str, overrides: list[str]) -> None:
    """Run the stage's script; its own progress bar and log lines go to the terminal."""
    command = ["bash", str(REPOSITORY / "scripts" / "train" / stage.script)]
    command += ["--model", str(locate(stage.model, out)), "--exp_name", stage.name, "--nnodes", "1"]
    if stage.reward_model is not None:
        command += ["--reward_model", str(locate(stage.reward_model, out))]
    command += [
        "data.max_prompt_length=24",
        "data.max_response_length=24",
        f"trainer.total_training_steps={stage.steps}",
        "trainer.test_freq=20",
        "trainer.log_val_generations=0",
        "trainer.logger=[console,tensorboard,file]",
        "trainer.resume_mode=disable",
        f"trainer.device={device}",
        *stage.overrides,
    ]
    if stage.frozen is not None:
        command.append(f"trainer.critic_warmup={round(stage.frozen * stage.steps)}")
    command += overrides
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "DATA_DIR": str(out),
        "N_GPUS_PER_NODE": str(ranks),
        "TENSORBOARD": os.environ.get("TENSORBOARD", "off"),
        **for_children(),
    }
    if code := call(command, cwd=out, env=environment):
        sys.exit(f"{stage.name} has ended with exit code {code}")


def answer(folder: Path, prompts: list[str]) -> tuple[list[str], float]:
    """Greedy answers of a Hugging Face folder, by transformers alone, and their mean length in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    lengths = (output != tokenizer.pad_token_id).sum(-1).float()
    return tokenizer.batch_decode(output, skip_special_tokens=True), lengths.mean().item()


def grade(folder: Path, world: World, test: pd.DataFrame) -> Result:
    """Answer the held-out prompts and compare with the world's truth."""
    prompts = [messages[0]["content"] for messages in test["content"]]
    answers, length = answer(folder, prompts)
    grades = [world.grade(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    return Result(
        rouge=mean_rouge_l(answers, test["teacher_response"].tolist()),
        fact=sum(g.fact for g in grades) / len(grades),
        style=sum(g.style for g in grades) / len(grades),
        exact=sum(g.exact for g in grades) / len(grades),
        length=length,
        samples=list(zip(prompts, answers, strict=True))[:SHOWN_SAMPLES],
    )


def last_metric(out: Path, stage: str, name: str) -> str:
    """A metric's mean over the last ten steps that have it, or a dash."""
    lines = (out / "checkpoints" / "gad" / stage / "metrics.jsonl").read_text().splitlines()
    values = [data[name] for data in (json.loads(line)["data"] for line in lines) if name in data][-10:]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def report(results: dict[str, Result], seconds: dict[str, float], out: Path) -> str:
    """The table and the sample answers, as text."""
    lines = [f"{'':8} {'ROUGE-L':>8} {'fact':>6} {'style':>6} {'exact':>6} {'tokens':>7} {'d_acc':>6} {'seconds':>8}"]
    for name, r in results.items():
        d_acc = "-" if name == "base" else last_metric(out, name, "critic/d_acc")
        shares = f"{r.rouge:8.3f} {r.fact:6.1%} {r.style:6.1%} {r.exact:6.1%}"
        lines.append(f"{name:8} {shares} {r.length:7.1f} {d_acc:>6} {seconds[name]:8.0f}")
    for sample in range(SHOWN_SAMPLES):
        lines += ["", f"prompt   {next(iter(results.values())).samples[sample][0]}"]
        lines += [f"{name:8} {r.samples[sample][1]}" for name, r in results.items()]
    return "\n".join(lines)


def main() -> int:
    """Build, train, merge, grade, print; returns the exit code."""
    try:
        run(parse())
    except KeyboardInterrupt:
        print("\nended by Ctrl-C: the same command begins anew", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse() -> argparse.Namespace:
    """The flags; `out` is absolute, and may be written anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="everything is written here")
    parser.add_argument("--seed", type=int, default=0, help="of the world, its data and the base student")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train; vLLM answers on cuda")
    parser.add_argument("--ranks", type=int, help="training processes (default: 2, and 1 on cuda)")
    parser.add_argument("--steps", type=int, help="of each stage, instead of its own number")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more settings of every stage")
    options = parser.parse_args()
    out = options.out = options.out.absolute()
    if out.exists() and any(out.iterdir()) and not is_quick_start(out):
        parser.error(
            f"{out} holds something else than what a quick start leaves: delete that folder if nothing in it is "
            "wanted, or give another --out"
        )
    return options


def run(options: argparse.Namespace) -> None:
    """Everything, from an empty folder on."""
    ranks = options.ranks or (2 if options.device == "cpu" else 1)
    stages = [stage if options.steps is None else replace(stage, steps=options.steps) for stage in STAGES]
    out = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    quiet_transformers()
    torch.manual_seed(options.seed)

    seconds, results = {}, {}
    started = time.monotonic()
    print("[1/4] the world, its data, and a base student that speaks the language", flush=True)
    build = [sys.executable, "-m", "examples.quickstart.tiny_model", "--out", str(out), "--seed", str(options.seed)]
    if code := call(build, cwd=REPOSITORY):
        sys.exit(f"the base student could not be made: exit code {code}")
    check_data(out)
    world, test = World(options.seed), pd.read_parquet(out / "test.parquet")
    results["base"] = grade(out / "base", world, test)
    seconds["base"] = time.monotonic() - started
    for number, stage in enumerate(stages, start=2):
        print(f"[{number}/4] {stage.name}: {stage.steps} steps, {ranks} rank(s) on {options.device}", flush=True)
        started = time.monotonic()
        run_stage(stage, out, ranks, options.device, options.overrides)
        merged = merge(locate(f"{stage.name}/actor", out), out / "merged" / stage.name)
        results[stage.name] = grade(merged, world, test)
        seconds[stage.name] = time.monotonic() - started
    text = report(results, seconds, out)
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    grades = {name: asdict(result) | {"seconds": seconds[name]} for name, result in results.items()}
    (out / RESULTS).write_text(json.dumps(grades, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(printable(f"\n{text}\n\nModels, checkpoints and TensorBoard files: {out}"))


if __name__ == "__main__":
    sys.exit(main())
