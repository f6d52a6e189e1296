"""Whole checkpoints in the background: the trainer's own loop on a model that is a number, written when it may be."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from tests.trainer.ppo.test_best import VALUES, Crash, Trainer, latest
from verl.trainer.ppo import checkpointing
from verl.trainer.ppo.checkpointing import Checkpoints
from verl.utils.background import Background
from verl.utils.checkpoint.checkpoint_manager import step_of, verify_checkpoint
from verl.utils.checkpoint.recovery import clear_up, newest_whole
from verl.utils.checkpoint.sharded import own_shard, read_full_tensors
from verl.utils.signals import EndedBySignal, RunSignals


class LateWeights:
    """A model that is the number of its updates, and writes a copy of it when `may_write` is set."""

    def __init__(self):
        self.updates = 0
        self.may_write = threading.Event()
        self.may_write.set()
        self.begun, self.work = [], None
        self.fails = None

    def reserve_for_checkpoints(self):
        raise AssertionError("the trainer's business")

    def begin_checkpoint(self, folder):
        assert self.work is None, "the last one is waited for"
        self.begun.append(self.updates)
        copy = torch.tensor([float(self.updates)])
        for name in ("model", "optim"):
            (Path(folder) / name).mkdir(parents=True)
        self.work = Background(lambda: self.write(copy, folder), "late")

    def write(self, copy, folder):
        assert self.may_write.wait(60)
        if self.fails:
            raise self.fails
        for name in ("model", "optim"):
            own_shard({"w": copy}).write(Path(folder) / name)

    def checkpoint_is_written(self):
        if self.work is not None and not self.work.at_work:
            done, self.work = self.work, None
            done.wait()
        return [self.work is None]

    def load_checkpoint(self, folder):
        self.updates = int(read_full_tensors(f"{folder}/model")["w"])


class LateTrainer(Trainer):
    """`at[N]` is called in step N, counted from 0."""

    def __init__(self, run, values=VALUES, at=None, **settings):
        super().__init__(run, values, **{"best_metric": None, "async_save": True, "save_freq": 3, **settings})
        self.weights = LateWeights()
        self.checkpoints = Checkpoints(self.config.trainer, self.weights, None, {})
        self.at = at or {}

    def _make_step(self, prompts, timed):
        super()._make_step(prompts, timed)
        if self.global_step in self.at:
            self.at[self.global_step](self)


# That there is no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(checkpointing, "LOOK_S", 0.01)


def saved(run):
    """The steps of the checkpoints that are there, each whole and of its step."""
    folders = sorted(run.glob("global_step_*"), key=step_of)
    for folder in folders:
        verify_checkpoint(folder)
        assert int(read_full_tensors(folder / "actor" / "model")["w"]) == step_of(folder)
    return [step_of(folder) for folder in folders]


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_one_waits(tmp_path):
    """10 steps, saves after 3, 6, 9 and the last. The first one is held up until step 5 (the sixth)."""

    def hold(trainer):
        trainer.weights.may_write.clear()

    def look(trainer):
        assert saved_names(tmp_path) == ["global_step_3.tmp"]
        trainer.weights.may_write.set()

    trainer = LateTrainer(tmp_path, at={2: hold, 5: look})
    trainer.fit()
    assert saved(tmp_path) == [3, 6, 9, 10]
    assert trainer.weights.begun == [3, 6, 9, 10]
    assert latest(tmp_path) == 10


def saved_names(run):
    return sorted(path.name for path in run.glob("global_step_*"))


@pytest.mark.parametrize("keep", [1, 2])
def test_older_ones_go_after_a_step_from_a_newer_one(tmp_path, keep):
    seen = {}

    def look(trainer):
        trainer.checkpoints.wait()
        seen[trainer.global_step] = saved_names(tmp_path)

    trainer = LateTrainer(tmp_path, at=dict.fromkeys(range(10), look), save_freq=2, max_actor_ckpt_to_keep=keep)
    trainer.fit()
    assert saved(tmp_path) == [8, 10][-keep:]
    # In the step behind the save after step 8, the ones before it are still there.
    assert seen[8] == [f"global_step_{step}" for step in (2, 4, 6, 8)[-keep - 1 :]]


@pytest.mark.parametrize("cause", ["raises", "folder gone", "disk full"])
def test_a_failure_is_raised_in_the_next_step_and_names_the_folder(tmp_path, cause):
    def fail(trainer):
        trainer.weights.may_write.clear()
        error = OSError(28, "No space left on device") if cause == "disk full" else RuntimeError("bad\nluck")
        trainer.weights.fails = None if cause == "folder gone" else error

    def go_on(trainer):
        if cause == "folder gone":
            shutil.rmtree(tmp_path / "global_step_6.tmp")
        trainer.weights.may_write.set()
        trainer.checkpoints._writing.join()

    trainer = LateTrainer(tmp_path, at={5: fail, 6: go_on})
    with pytest.raises((RuntimeError, OSError), match=r"global_step_6\.tmp") as caught:
        trainer.fit()
    said = {"raises": "no checkpoint: luck", "folder gone": "actor/model", "disk full": "the disk is full"}
    assert caught.match(said[cause])
    assert trainer.weights.updates == 7, "in the step behind the one that saw it"
    assert latest(tmp_path) == 3
    clear_up(tmp_path)
    assert newest_whole(tmp_path, ("actor",)) == tmp_path / "global_step_3"


def test_a_failure_of_the_last_one_is_raised_too(tmp_path):
    def fail(trainer):
        trainer.weights.fails = RuntimeError("bad luck")

    with pytest.raises(RuntimeError, match=r"global_step_10\.tmp could not be written in the background"):
        LateTrainer(tmp_path, at={9: fail}).fit()


def release_soon(trainer, seconds=0.3):
    trainer.weights.may_write.clear()
    threading.Timer(seconds, trainer.weights.may_write.set).start()


def test_an_error_of_the_run_waits_for_what_is_being_written(tmp_path):
    trainer = LateTrainer(tmp_path, at={2: release_soon, 3: lambda trainer: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert saved(tmp_path) == [3]


@pytest.mark.parametrize("what", ["Shard.write", "checksums"])
def test_however_long_it_takes_where_the_ranks_answer(tmp_path, monkeypatch, what):
    """A large file on its way to the disk does not grow, and checksums are read of what is there already."""
    monkeypatch.setattr(checkpointing, "SILENCE_S", 0.1)
    seal = checkpointing.seal_checkpoint
    if what == "checksums":
        monkeypatch.setattr(checkpointing, "seal_checkpoint", lambda *given: (time.sleep(0.5), seal(*given)))
    write = release_soon if what == "Shard.write" else lambda trainer: None
    trainer = LateTrainer(tmp_path, at={2: write, 3: lambda trainer: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert saved(tmp_path) == [3]


def test_an_error_of_the_run_does_not_wait_for_ranks_that_do_not_answer(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpointing, "SILENCE_S", 0.2)
    answers, asked = threading.Event(), []

    def hangs(trainer):
        trainer.weights.checkpoint_is_written = lambda: asked.append(1) or [answers.wait(60) and False]

    trainer = LateTrainer(tmp_path, at={2: hangs, 3: lambda trainer: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert "its ranks do not answer" in caplog.text
    assert saved_names(tmp_path) == ["global_step_3.tmp"]
    # Nobody is asked any more.
    answers.set()
    time.sleep(0.1)
    assert asked == [1]


class Signals:
    received = None

    def at_step_ends(self, waits):
        return nullcontext()


@pytest.mark.parametrize("at", [3, 5])
def test_a_signal_waits_for_both_checkpoints(tmp_path, at):
    """The one on its way, of step 3, and that of the step at hand."""
    trainer = LateTrainer(tmp_path)
    trainer.signals = Signals()
    trainer.at = {2: release_soon, at: lambda trainer: setattr(trainer.signals, "received", signal.SIGTERM)}
    trainer.fit()
    assert saved(tmp_path) == [3, at + 1]
    assert latest(tmp_path) == at + 1


def test_a_signal_behind_the_last_step_waits_for_its_checkpoint(tmp_path):
    """It is not followed by the last validation."""

    def signal_soon(trainer):
        release_soon(trainer, seconds=0.8)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    signals = RunSignals()
    trainer = LateTrainer(tmp_path, at={9: signal_soon}, test_freq=5)
    trainer.signals = signals
    with pytest.raises(EndedBySignal), signals.taken():
        trainer.fit()
    assert saved(tmp_path)[-1] == latest(tmp_path) == 10
    assert 10 not in trainer.logged


def test_the_end_at_once_leaves_the_one_before(tmp_path):
    def interrupt(trainer):
        raise KeyboardInterrupt

    trainer = LateTrainer(tmp_path, at={5: lambda t: t.weights.may_write.clear(), 7: interrupt})
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert time.monotonic() - start < 5
    # The writer is held up still: let go, it would write into what is cleared up, as no process that has ended does.
    clear_up(tmp_path)
    assert saved(tmp_path) == [3]
    trainer.weights.may_write.set()


def test_the_best_and_an_early_stop_are_on_the_disk(tmp_path):
    """0.7 after step 6, saved by then in the background, is the best; the patience ends after step 9."""
    trainer = LateTrainer(
        tmp_path, at={5: release_soon}, best_metric="val/x", early_stop_patience=3, save_freq=6
    )  # fmt: skip
    trainer.fit()
    assert saved(tmp_path) == [6, 9]
    assert step_of(tmp_path / "best") == 6
    assert trainer.weights.begun.count(6) == 1


@pytest.mark.parametrize("crash", range(1, 10))
def test_a_run_that_crashed_and_resumed_is_the_run_that_did_not(tmp_path, crash):
    settings = {"best_metric": "val/x", "max_actor_ckpt_to_keep": 1}
    whole = LateTrainer(tmp_path / "whole", **settings)
    whole.fit()
    logged = {}
    for at in (crash, None):
        part = LateTrainer(tmp_path / "parts", **settings)
        part.crash = at
        with suppress(Crash):
            part.fit()
        logged |= part.logged
    assert logged == whole.logged
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")
