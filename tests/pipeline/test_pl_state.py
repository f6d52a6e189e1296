"""What has been done, told from folders; processes that get the pipeline's signals and do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from verl.pipeline.needs import disk_need, seconds_left
from verl.pipeline.preflight import Look
from verl.pipeline.processes import wait_until_left
from verl.pipeline.settings import Models
from verl.pipeline.state import FILE, State, handed_on, settings_of
from verl.trainer.config import compose_config
from verl.trainer.ppo.checkpointing import kept_of
from verl.utils.checkpoint.best_link import point_best
from verl.utils.checkpoint.room import Part
from verl.utils.run_lock import only_run_in

ROOT = Path(__file__).parents[2]


def config_of(*settings, stage="seqkd"):
    return compose_config(
        [f"stage={stage}", "trainer.device=cpu", "data.train_files=t", "actor_rollout_ref.model.path=/m",
         "trainer.experiment_name=x", *settings]
    )  # fmt: skip


def checkpoint(run, step):
    (run / f"global_step_{step}").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_stage_is_finished_while_its_last_checkpoint_is_there(tmp_path):
    state, config = State(tmp_path), config_of()
    assert state.finished("seqkd") is None
    state.begin("seqkd", config)
    checkpoint(tmp_path / "seqkd", 4)
    assert State(tmp_path).finished("seqkd") is None
    state.finish("seqkd", 4)
    assert State(tmp_path).finished("seqkd") == 4 and State(tmp_path).finished("gad") is None
    checkpoint(tmp_path / "seqkd", 6)
    assert State(tmp_path).finished("seqkd") is None


def test_changes_that_matter_are_told_and_others_are_free(tmp_path):
    state = State(tmp_path)
    state.begin("seqkd", config_of())
    free = config_of(
        "trainer.logger=[console]", "trainer.save_freq=7", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9000",
        "actor_rollout_ref.model.path=/elsewhere", "data.train_files=u", "trainer.n_gpus_per_node=2",
        "trainer.test_freq=3",
    )  # fmt: skip
    assert State(tmp_path).changes("seqkd", free) == []
    other = config_of("actor_rollout_ref.actor.optim.lr=1e-3", "data.max_response_length=99")
    found = State(tmp_path).changes("seqkd", other)
    assert "actor_rollout_ref.actor.optim.lr=5e-06, now 0.001" in found
    assert any(change.startswith("data.max_response_length=") and change.endswith("now 99") for change in found)


def test_changes_are_of_settings_that_were_given_or_left_out(tmp_path):
    """The engine's limit of answers and the mini-batches follow, and nobody gave them."""
    given = ["data.max_response_length=99", "data.train_batch_size=64"]
    State(tmp_path).begin("seqkd", config_of(*given), given)
    assert len(settings_changed(given)) > 2
    now = ["++data.train_batch_size=32"]
    found = State(tmp_path).changes("seqkd", config_of(*now), now)
    assert sorted(change.partition("=")[0] for change in found) == ["data.max_response_length", "data.train_batch_size"]
    # What nobody gave is another default: all of it is told.
    assert State(tmp_path).changes("seqkd", config_of(*given, "data.seed=9"), given)[0] == "data.seed=1, now 9"


def settings_changed(given):
    one, other = settings_of(config_of()), settings_of(config_of(*given))
    return [key for key in one if one[key] != other[key]]


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": {"seqkd": {"step": 1}}}', '{"stages": 3}'])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"pipeline\.json is damaged"):
        State(tmp_path)


def test_the_best_is_handed_on_where_it_was_asked_for(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step)
    point_best(tmp_path, 2)
    assert handed_on(tmp_path, config_of()).name == "global_step_4"
    best = config_of("trainer.best_metric=val/rouge-L/mean", "data.val_files=v")
    assert handed_on(tmp_path, best).name == "global_step_2"
    # A warmup is there for the discriminator.
    for metric, step in (("val/rouge-L/mean", 4), ("val/critic/d_acc", 2)):
        settings = (f"trainer.best_metric={metric}", "data.val_files=v", "critic.model.path=/c")
        assert handed_on(tmp_path, config_of(*settings, stage="warmup")).name == f"global_step_{step}"


def test_what_a_stage_takes_of_the_disk():
    """Ten parameters, 12 bytes each in a checkpoint and two in the merged student; ten steps."""

    def need(*settings):
        config = config_of(*settings)
        parts = {"actor": Part(120, kept_of(config.trainer)["actor"])}
        return disk_need(Look("seqkd", Models("/m", "/m"), config, steps=10, parts=parts, merged=10))

    assert need("trainer.save_freq=4") == 3 * 120 + 20  # 4, 8, 10
    assert need("trainer.save_freq=1") == 3 * 120 + 20  # two are kept, and a third is being written
    assert need("trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=null") == 10 * 120 + 20
    assert need("trainer.save_freq=-1") == 120 + 20
    assert need("trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=1") == 2 * 120 + 20
    assert need("trainer.save_freq=-1", "trainer.best_metric=val/rouge-L/mean", "data.val_files=v") == 2 * 120 + 20
    assert disk_need(Look("seqkd", Models("/m", "/m"), config_of(), steps=10)) is None


def test_time_is_told_by_steps_that_were_made(tmp_path):
    look = Look("seqkd", Models("/m", "/m"), config_of(), done=3, steps=13)
    assert seconds_left(look, tmp_path) is None
    lines = [f'{{"step": {step}, "data": {{"timing_s/step": {seconds}}}}}' for step, seconds in enumerate((60, 2, 4))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "da')
    assert seconds_left(look, tmp_path) == 40  # the median, 4 s, times 10
    assert seconds_left(replace(look, done=13), tmp_path) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Processes

CHILD = """
import os, signal, sys, time
from pathlib import Path
note = Path(sys.argv[1])
def end(number, frame):
    note.with_suffix(".got").write_text(signal.Signals(number).name)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
note.write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import sys
from verl.pipeline.processes import Processes
processes = Processes()
with processes.signals_taken():
    sys.exit(processes.run("waiting_child", sys.argv[1]))
"""


@pytest.fixture
def started(tmp_path):
    """A pipeline's process, at work on a child that tells the signal it gets."""
    (tmp_path / "waiting_child.py").write_text(textwrap.dedent(CHILD))
    note = tmp_path / "note.pid"
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(note)], env=os.environ | {"PYTHONPATH": path}, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = psutil.Process(int(note.read_text()))
    yield parent, child, note.with_suffix(".got")
    for process in (parent, child):
        if psutil.pid_exists(process.pid):
            process.kill()
    parent.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_the_exit_code_is_the_childs(started, number):
    parent, _, got = started
    parent.send_signal(number)
    assert parent.wait(30) == 128 + number
    assert got.read_text() == signal.Signals(number).name


def test_a_pipeline_that_is_killed_leaves_no_child_behind(started):
    parent, child, got = started
    parent.kill()
    parent.wait(30)
    child.wait(30)
    assert got.read_text() == "SIGTERM"


def test_a_child_that_a_signal_ends_has_the_shells_exit_code(started):
    parent, child, _ = started
    child.kill()
    assert parent.wait(30) == 137


def test_a_folder_that_a_trainer_holds_is_waited_for(tmp_path, capsys):
    wait_until_left(tmp_path)
    with only_run_in(tmp_path), pytest.raises(BlockingIOError, match="does not end"):
        wait_until_left(tmp_path, patience=0.5)
    assert "waiting for its end" in capsys.readouterr().out
    wait_until_left(tmp_path)
