"""The best validation and the early stop: the comparison by hand, then the trainer's own loop on given validations."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl.trainer.config import compose_config
from verl.trainer.ppo.best import BestState, BestTracker, first_that_counts, open_best
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.trainer.ppo.head_start import HeadStart
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.checkpoint.checkpoint_manager import step_of

NAN, INF = math.nan, math.inf
KEEP_ALL = {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None}


def see(tracker, values, start=0, every=10):
    """Which of the validations of steps 0, 10, 20, ... were new bests."""
    return [tracker.see(start + every * i, {"val/x": value}) for i, value in enumerate(values)]


# ---- the comparison


@pytest.mark.parametrize(
    ("mode", "values", "bests", "misses"),
    [
        ("max", [0.5, 0.6, 0.6, 0.55, 0.7, 0.1], [True, True, False, False, True, False], 1),
        ("min", [0.5, 0.6, 0.4, 0.4, 0.45, 0.5], [True, False, True, False, False, False], 3),
        ("max", [-1.0, -2.0, -0.5], [True, False, True], 0),
        # What is not a number is no best, and not the one to beat either.
        ("max", [NAN, NAN, 0.1, NAN], [False, False, True, False], 1),
        ("min", [INF, 5.0, -INF, 0.0], [True, True, True, False], 1),
    ],
)
def test_bests_and_misses(mode, values, bests, misses):
    tracker = BestTracker("val/x", mode)
    assert see(tracker, values) == bests
    last = max(i for i, best in enumerate(bests) if best)
    expected = BestState("val/x", mode, 10 * last, values[last], 10 * (len(values) - 1), misses)
    assert tracker.state == expected
    assert tracker.metrics() == {"val/best/value": values[last], "val/best/step": 10 * last}
    assert not tracker.exhausted, "without a patience it never ends"


def test_no_best_yet():
    tracker = BestTracker("val/x", "max", patience=2)
    assert tracker.metrics() == {}
    see(tracker, [NAN, NAN])
    assert tracker.metrics() == {}
    assert tracker.exhausted
    assert tracker.verdict(NAN) == "val/x was not a number in 2 validations in a row"


def test_patience_counts_validations_in_a_row():
    tracker = BestTracker("val/x", "max", patience=2)
    ends = []
    for step, value in enumerate([0.5, 0.4, 0.6, 0.6, 0.5]):
        tracker.see(step, {"val/x": value})
        ends.append(tracker.exhausted)
    assert ends == [False, False, False, False, True]
    assert tracker.verdict(0.5) == (
        "val/x was best at step 2, 0.6; now it is 0.5, worse by 0.1 (validations in a row without a better one: 2)"
    )


def test_validations_of_a_frozen_actor_do_not_count():
    """With critic_warmup=10 the first update is step 10's: validations of steps 0 to 10 measure the same weights."""
    tracker = BestTracker("val/x", "max", patience=1, counts_from=11)
    see(tracker, [0.5, 0.5, 0.5], every=5)
    assert tracker.state.misses == 0
    tracker.see(15, {"val/x": 0.4})
    assert tracker.exhausted


def test_a_validation_made_again_counts_once():
    tracker = BestTracker("val/x", "max", patience=2)
    see(tracker, [0.5, 0.4])
    resumed = BestTracker("val/x", "max", patience=2)
    resumed.load(tracker.state)
    assert not resumed.see(10, {"val/x": 0.4})
    # The same weights on another number of ranks may differ by rounding.
    assert not resumed.see(10, {"val/x": 0.51})
    assert resumed.state == tracker.state


@pytest.mark.parametrize("other", [("val/y", "max"), ("val/x", "min")])
def test_another_metric_starts_anew(other, caplog):
    tracker = BestTracker("val/x", "max")
    tracker.load(BestState(*other, step=3, value=0.5))
    assert tracker.state == BestState("val/x", "max")
    assert "looked for anew" in caplog.text
    tracker.load(None)
    assert tracker.state == BestState("val/x", "max")


def test_an_unknown_metric_names_the_nearest_first():
    measured = {"val/sft_loss": 1.0, "val/rouge-L/mean": 0.5, "val/critic/d_acc": 0.6}
    with pytest.raises(ValueError, match=r"val/rougeL/mean is not .*; use val/rouge-L/mean, .*val/sft_loss"):
        BestTracker("val/rougeL/mean", "max").see(0, measured)


# ---- the state on disk


def test_an_older_checkpoints_state_is_read(tmp_path):
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"global_step": 7, "samples_seen": 28, "kl_coef": 0.1}))
    assert RunState.read(file) == RunState(7, 28, 0.1, best=None)
    file.write_text(json.dumps({"global_step": 7, "samples_seen": 28, "kl_coef": 0.1, "best": None}))
    assert RunState.read(file).best is None
    best = {"metric": "val/x", "mode": "max", "step": 3, "value": 0.1 + 0.2}
    file.write_text(json.dumps({"global_step": 7, "samples_seen": 28, "kl_coef": 0.1, "best": best}))
    assert RunState.read(file).best == BestState("val/x", "max", 3, 0.1 + 0.2, validated=-1, misses=0)


# ---- before any work


@cache
def stage(name):
    return compose_config(
        [
            *(f"stage={name}", "data.train_files=x", "data.val_files=x", "actor_rollout_ref.model.path=x"),
            *("trainer.experiment_name=x", "trainer.device=cpu", "data.train_batch_size=4"),
        ]
    )


def config(run, of="seqkd", **trainer):
    settings = {"default_local_dir": str(run), "best_metric": "val/x", **trainer}
    return replace(stage(of), trainer=replace(stage(of).trainer, **settings))


def test_open_best(tmp_path):
    assert open_best(config(tmp_path, best_metric=None)) is None
    assert open_best(config(tmp_path, val_only=True)) is None
    assert list(tmp_path.iterdir()) == []
    tracker = open_best(config(tmp_path / "run", early_stop_patience=3, best_mode="min"))
    assert (tracker.state, tracker.patience) == (BestState("val/x", "min"), 3)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "first_actor_step", "first"),
    [("val/x", 10, 11), ("val/x", 0, 1), ("val/x", None, math.inf), ("val/critic/d_acc", 10, 0)],
)
def test_the_patience_begins_with_the_actors_training(metric, first_actor_step, first):
    assert first_that_counts(metric, first_actor_step) == first


def test_a_file_system_without_links_is_found_at_once(tmp_path, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(OSError, match=r"takes no symbolic links \(Operation not permitted\).*best_metric=null"):
        open_best(config(tmp_path))


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_what_is_in_the_place_of_the_link_is_left_alone(tmp_path, make):
    make(tmp_path / "best")
    with pytest.raises(FileExistsError, match="move it away"):
        open_best(config(tmp_path))


# ---- the trainer's loop, with validations that are given


class Weights:
    """A model that is the number of its updates."""

    def __init__(self):
        self.updates = 0

    def save_checkpoint(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "model").write_text(str(self.updates))

    def load_checkpoint(self, folder):
        self.updates = int((Path(folder) / "model").read_text())


class Crash(Exception):
    """The end of a run that nobody planned."""


class Trainer(RayPPOTrainer):
    """The real loop, resuming and saving; steps add one, and validations are looked up."""

    def __init__(self, run, values, crash=None, **settings):
        self.config = config(run, **{"test_freq": 1, "save_freq": 5, **KEEP_ALL, **settings})
        self.values, self.crash = values, crash
        self.best = open_best(self.config)
        self.weights = Weights()
        self.checkpoints = Checkpoints(self.config.trainer, self.weights, None, {})
        self.student = SimpleNamespace(weights_changed=lambda: None)
        self.validation = SimpleNamespace(run=self._look_up)
        self.generation = SimpleNamespace(through=lambda batches, step: batches)
        self.kl_ctrl = type("Fixed", (), {"value": 0.0})
        self.head_start = HeadStart(self.config, None, len(values) - 1)
        self.discriminator = self.held_out = self.rejected = None
        self.val_dataset = [0]
        self.global_step = self.samples_seen = 0
        self.total_steps = len(values) - 1
        self.logged = {}

    def _batches(self):
        while self.global_step < self.total_steps:
            yield None

    def _make_step(self, prompts, timed):
        if self.global_step == self.crash:
            raise Crash
        self.weights.updates += 1

    def _look_up(self, step, tracking):
        assert self.weights.updates == self.global_step
        return {"val/x": self.values[self.global_step]}

    def _open_tracking(self):
        return nullcontext(self)

    def log(self, metrics, step):
        # Of two lines for one step the later counts.
        self.logged[step] = {name: value for name, value in metrics.items() if not name.startswith("timing")}

    def _step_metrics(self, step, timing):
        return {}


def saved(run):
    """The steps whose checkpoints are there, those kept as best only in brackets, and what `best` names."""
    names = []
    for folder in sorted(run.glob("global_step_*"), key=step_of):
        assert (folder / "actor" / "model").read_text() == str(step_of(folder))
        names.append(f"({step_of(folder)})" if (folder / "only_as_best.txt").exists() else str(step_of(folder)))
    best = step_of(run / "best") if (run / "best").is_symlink() else None
    assert best is None or (run / "best" / "actor" / "model").read_text() == str(best)
    return " ".join(names), best


def latest(run):
    return int((run / "latest_checkpointed_iteration.txt").read_text())


#         step 0    1    2    3    4    5    6    7    8    9    10
VALUES = [0.1, 0.2, 0.5, 0.3, 0.4, 0.6, 0.7, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 6 is the best and not a multiple of 5; 0, 1 and 2, bests in their time, are gone.
        ({}, "5 (6) 10"),
        ({"max_actor_ckpt_to_keep": 1}, "(6) 10"),
        # The best is a regular one: spared where the second last is not.
        ({"save_freq": 2, "max_actor_ckpt_to_keep": 1}, "6 10"),
        ({"save_freq": 2, "max_actor_ckpt_to_keep": 2}, "6 8 10"),
        ({"save_freq": -1}, "(6) 10"),
    ],
)
def test_what_is_kept(tmp_path, settings, expected):
    trainer = Trainer(tmp_path, VALUES, **settings)
    trainer.fit()
    assert saved(tmp_path) == (expected, 6)
    assert latest(tmp_path) == 10
    assert trainer.logged[4] == {"val/x": 0.4, "val/best/value": 0.5, "val/best/step": 2}
    assert trainer.logged[10] == {"val/x": 0.2, "val/best/value": 0.7, "val/best/step": 6}


def test_by_default_the_last_two_and_the_best_are_kept_and_what_goes_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    kept = {name: getattr(stage("seqkd").trainer, name) for name in KEEP_ALL}
    assert kept == dict.fromkeys(KEEP_ALL, 2)
    Trainer(tmp_path, VALUES, save_freq=2, **kept).fit()
    assert saved(tmp_path) == ("6 8 10", 6)
    said = [message.partition(":")[0] for message in caplog.messages if message.startswith("pruned ")]
    # Each when a step from the newest has been made: 6 stays for being the best when 10 is the newest.
    assert said == ["pruned global_step_2", "pruned global_step_4"]
    assert "kept are the last 2 (trainer.max_actor_ckpt_to_keep) and the best" in caplog.text


def test_without_best_metric_nothing_changes(tmp_path):
    trainer = Trainer(tmp_path, VALUES, best_metric=None)
    trainer.fit()
    assert saved(tmp_path) == ("5 10", None)
    assert trainer.logged[4] == {"val/x": 0.4}


@pytest.mark.parametrize(
    ("patience", "end", "kept", "best"),
    # 0.5 at step 2 is followed by 0.3, 0.4; 0.7 at step 6 by four times 0.2.
    [(2, 4, "(2) 4", 2), (3, 9, "5 (6) 9", 6), (4, 10, "5 (6) 10", 6)],
)
def test_early_stop(tmp_path, caplog, patience, end, kept, best):
    caplog.set_level("INFO")
    trainer = Trainer(tmp_path, VALUES, early_stop_patience=patience)
    trainer.fit()
    assert saved(tmp_path) == (kept, best)
    assert latest(tmp_path) == max(trainer.logged) == end
    assert trainer.logged[end].keys() == {"val/x", "val/best/value", "val/best/step"}
    sentence = f"early stop after {end} of 10 steps: val/x was best at step {best}, {VALUES[best]}; now it is"
    assert (sentence in caplog.text) == (end < 10), "at the last step there is nothing to stop"
    # The same command once more changes nothing and stops again; with more patience it would go on.
    again = Trainer(tmp_path, VALUES, early_stop_patience=patience)
    again.fit()
    assert saved(tmp_path) == (kept, best)
    assert again.logged == {end: trainer.logged[end]}


@pytest.mark.parametrize("patience", [2, 3, 20])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("crash", range(10))
def test_a_run_that_crashed_and_resumed_is_the_run_that_did_not(tmp_path, crash, every, patience):
    settings = {"test_freq": every, "save_freq": 4, "early_stop_patience": patience, "max_actor_ckpt_to_keep": 1}
    whole = Trainer(tmp_path / "whole", VALUES, **settings)
    whole.fit()
    logged = {}
    for at in (crash, None):
        part = Trainer(tmp_path / "parts", VALUES, crash=at, **settings)
        with suppress(Crash):
            part.fit()
        logged |= part.logged
    assert logged == whole.logged
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")
    states = [RunState.read(tmp_path / run / f"global_step_{latest(tmp_path / run)}" / "trainer_state.json")
              for run in ("parts", "whole")]  # fmt: skip
    assert states[0] == states[1]
    assert states[0].samples_seen == 4 * states[0].global_step


def test_a_crash_between_saving_and_the_link(tmp_path, monkeypatch):
    """The checkpoint of step 6 is complete and `best` still names 5: so it does after resuming, for a moment."""
    trainer = Trainer(tmp_path, VALUES)

    def crash(step):
        if step == 6:
            raise Crash
        return Checkpoints.point_best(trainer.checkpoints, step)

    monkeypatch.setattr(trainer.checkpoints, "point_best", crash)
    with pytest.raises(Crash):
        trainer.fit()
    assert saved(tmp_path) == ("(2) 5 (6)", 5)
    Trainer(tmp_path, VALUES).fit()
    assert saved(tmp_path) == ("5 (6) 10", 6)


def test_resuming_from_best(tmp_path, caplog):
    """Here, and from another run's folder, where its best is not."""
    Trainer(tmp_path / "one", VALUES).fit()
    path = {"resume_mode": "resume_path", "resume_from_path": f"{tmp_path}/one/best"}
    here = Trainer(tmp_path / "one", VALUES, **path)
    here.fit()
    assert min(here.logged) == 6
    assert saved(tmp_path / "one") == ("5 (6) 10", 6)
    assert "is not in" not in caplog.text
    there = Trainer(tmp_path / "two", VALUES, **path)
    there.fit()
    assert saved(tmp_path / "two") == ("10", None)
    assert there.logged[10]["val/best/step"] == 6
    assert "of step 6, is not in" in caplog.text


def test_a_run_without_best_metric_spares_an_earlier_best(tmp_path):
    Trainer(tmp_path, VALUES).fit()
    longer = [*VALUES, *[0.9] * 10]
    Trainer(tmp_path, longer, best_metric=None, max_actor_ckpt_to_keep=1).fit()
    assert saved(tmp_path) == ("(6) 20", 6)


def test_an_earlier_runs_checkpoint_of_the_same_step_is_not_taken_for_this_ones(tmp_path):
    """A run from scratch in a used folder: what it validates is what it saves."""
    Trainer(tmp_path, VALUES, save_freq=1).fit()
    stale = tmp_path / "global_step_0"
    os.makedirs(stale / "actor", exist_ok=True)
    (stale / "actor" / "model").write_text("of another run")
    Trainer(tmp_path, [0.5, 0.1, 0.1], resume_mode="disable").fit()
    assert step_of(tmp_path / "best") == 0
    assert (tmp_path / "best" / "actor" / "model").read_text() == "0"


def test_the_first_validation_ends_a_run_with_a_misspelt_metric(tmp_path):
    trainer = Trainer(tmp_path, VALUES, best_metric="val/z")
    with pytest.raises(ValueError, match="use val/x"):
        trainer.fit()
    assert trainer.weights.updates == 0
