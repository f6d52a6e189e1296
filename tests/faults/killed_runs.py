"""One run in one process, killed with -9 again and again and started by the same settings until it is done.

`python -m tests.faults.killed_runs FOLDER chosen|random SEED` makes an undisturbed run (`whole`) and a killed one
(`killed`) in FOLDER/runs and prints a line of JSON for each of its lives.
Lives are forks, so that each need not import torch.

Chosen moments are system calls on the run's folder: before a file is opened for writing, before it reaches the disk,
before anything is renamed or removed. A kill before a call is one after the call before it.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.running import train
from tests.tiny import write_data, write_model
from verl.trainer.in_process import InProcessRunner, InProcessTrainer
from verl.utils.checkpoint.checkpoint_manager import tracked_step

STEPS, KILLS = 30, 20
# A random moment is so long after one of the first three steps of a life began; a step and a save take less.
LONGEST_S = 0.6
CALLS = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "shutil.rmtree": 0, "os.symlink": 1}


def make_run(folder: Path, name: str, began: Callable[[int], None]) -> None:
    """A warmup with replay, validation and `best`; `began` is told of every step that begins."""

    class Trainer(InProcessTrainer):
        def _make_step(self, prompts, timed):
            began(self.global_step)
            return super()._make_step(prompts, timed)

    class Runner(InProcessRunner):
        trainer_class = Trainer

    settings = (
        "stage=warmup", f"critic.model.path={folder}/base", "trainer.critic_warmup=1", "critic.replay.capacity=24",
        "critic.replay.fraction=0.25", "trainer.save_freq=1", f"trainer.total_training_steps={STEPS}",
        "trainer.test_freq=4", "trainer.val_before_train=False", "trainer.best_metric=val/rouge-L/mean",
        "trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=1",
    )  # fmt: skip
    train(folder, name, *settings, run_with=lambda config: Runner().run(config))


def watch_calls(root: Path, see: Callable[[str], None]) -> None:
    """Tell `see` of every call on the folder before it is made, numbers of steps left out."""

    def name(what: str, path: object) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if text.startswith(f"{root}/"):
            see(f"{what} {re.sub('global_step_[0-9]+', 'global_step_N', text.removeprefix(f'{root}/'))}")

    def audit(event: str, arguments: tuple) -> None:
        if event in CALLS:
            name(event, arguments[CALLS[event]])
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            name("write", arguments[0])

    sync = os.fsync

    def watched_sync(descriptor: int) -> None:
        name("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    sys.addaudithook(audit)
    os.fsync = watched_sync


def fork(work: Callable[[], None], log: Path) -> int:
    """Its process id."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def undisturbed(folder: Path) -> list[str]:
    """The calls of a whole run, each once."""
    seen = folder / "calls"

    def life() -> None:
        calls = {}
        watch_calls(folder / "runs" / "whole", lambda call: calls.setdefault(call))
        make_run(folder, "whole", lambda step: None)
        seen.write_text(json.dumps(list(calls)))

    _, status = os.waitpid(fork(life, folder / "whole.log"), 0)
    if status:
        raise RuntimeError((folder / "whole.log").read_text())
    return json.loads(seen.read_text())


def choose(calls: list[str], chance: random.Random) -> list[str]:
    """Names given and taken first, then others."""
    saving = [call for call in calls if "global_step" in call or "latest" in call or " best" in call]
    names = [call for call in saving if call.split()[0] in ("os.rename", "os.remove", "shutil.rmtree", "os.symlink")]
    others = sorted(set(saving) - set(names))
    chosen = names[:KILLS] + chance.sample(others, KILLS - len(names[:KILLS]))
    chance.shuffle(chosen)
    return chosen


def one_life(folder: Path, moment: str | None, steps: int, delay: float | None) -> dict:
    """Start the run, kill it before the first such call, or so long after so many more steps than the first have begun;
    neither: let it end."""
    root = folder / "runs" / "killed"
    before = tracked_step(root) if root.is_dir() else None
    reading, writing = os.pipe()

    def life() -> None:
        os.close(reading)
        if moment is not None:
            watch_calls(root, lambda call: os.kill(os.getpid(), signal.SIGKILL) if call == moment else None)
        make_run(folder, "killed", lambda step: os.write(writing, f"{step}\n".encode()))

    child = fork(life, folder / "killed.log")
    os.close(writing)
    with os.fdopen(reading) as began:
        first = began.readline().strip()
        if delay is not None and first:
            for _ in range(steps):
                began.readline()
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    after = tracked_step(root)
    return {"moment": moment, "steps": steps, "delay": delay, "saved": before,
            "began": int(first) if first else None, "killed": killed, "status": status,
            "saved_then": after}  # fmt: skip


def main(folder: Path, way: str, seed: int) -> None:
    write_model(folder / "base")
    write_data(folder / "train.jsonl", rows=18)
    write_data(folder / "val.jsonl", rows=5)
    chance = random.Random(seed)
    calls = undisturbed(folder)
    moments = choose(calls, chance) if way == "chosen" else [None] * KILLS
    for moment in moments:
        delay = None if way == "chosen" else round(chance.uniform(0, LONGEST_S), 3)
        print(json.dumps(one_life(folder, moment, chance.randrange(3), delay)), flush=True)
    print(json.dumps(one_life(folder, None, 0, None)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
