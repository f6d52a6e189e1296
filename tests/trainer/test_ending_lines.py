"""What a run says at its end: the lines of real runs on one rank, and of the real loop ended in every way."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.e2e.running import train
from tests.tiny import write_data, write_model
from tests.trainer.ppo.test_best import VALUES, Crash, Trainer
from verl.model_merger.cli import build_parser as merger_flags
from verl.monitor.__main__ import build_parser as monitor_flags
from verl.monitor.live import StoppedByAlarm
from verl.tools.judge.options import build_parser as judge_flags
from verl.trainer.in_process import run_in_process
from verl.trainer.ppo.ending import end_said, logged_metrics, nothing_left
from verl.trainer.ppo.next_commands import SCRIPTS, closing_commands, report_command
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
from verl.utils.command_line import WHAT_NEXT, for_children
from verl.utils.signals import EndedBySignal, RunSignals

LOG = "verl.trainer.ppo.ending"


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG]


def commands(lines) -> dict[str, list[str]]:
    """The words of each command that the lines have, by what it runs."""
    found = {}
    for line in lines:
        _, is_there, command = line.partition(": bash ")
        if is_there:
            found["script"] = shlex.split("bash " + command)
        elif " python -m " in line:
            words = shlex.split(line[line.index("python -m ") :])
            found[words[2]] = words[3:]
    return found


# ---- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Names that a shell and Hydra have to be told about."""
    path = tmp_path_factory.mktemp("end") / "学 生's"
    path.mkdir()
    write_model(path / "base")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    yield path
    if dist.is_initialized():
        dist.destroy_process_group()


def go(folder, name, *overrides, steps=2):
    return train(
        folder, name, f"trainer.total_training_steps={steps}", "trainer.val_before_train=False", *overrides,
        run_with=run_in_process,
    )  # fmt: skip


def test_seqkd_names_what_comes_next_and_nothing_left_is_seen_before_models_are_built(folder, caplog):
    caplog.set_level("INFO")
    settings = ("stage=seqkd", "trainer.best_metric=val/sft_loss", "trainer.best_mode=min", "trainer.test_freq=1")
    run = go(folder, "seqkd", *settings)
    lines = said(caplog)
    assert len(lines) == 7 and lines[0].startswith("done: 2 of 2 steps of SeqKD are made, ")
    assert re.match(r"reached: rouge-L .*, sft_loss .*, loss in the last step ", lines[1])
    assert lines[2].startswith(f"newest checkpoint: {run}/global_step_2; best: {run}/best, of step ")
    assert all(line in (run / "logs" / "driver.log").read_text() for line in lines)

    found = commands(lines)
    # Every command is one: flags that are known, models and files that are there.
    script = subprocess.run(
        found["script"], cwd=SCRIPTS.parents[1], capture_output=True, text=True,
        env={**os.environ, "PYTHON": "echo", "N_GPUS_PER_NODE": "1"},
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    assert f"stage=warmup data.train_files=data/train.parquet data.val_files=data/test.parquet "\
        f"actor_rollout_ref.model.path={run}/best/actor critic.model.path={run}/best/actor "\
        "trainer.experiment_name=warmup" in script.stdout  # fmt: skip
    assert (
        f"data.train_files={folder}/train.jsonl" in found["script"] and "data.max_response_length=10" in found["script"]
    )
    merger = merger_flags().parse_args(["merge", *found["verl.model_merger"]])
    assert Path(merger.local_dir) == run / "best" / "actor" and merger.target_dir == "merged/seqkd"
    judge = judge_flags().parse_args(found["verl.tools.judge"])
    assert (judge.data, judge.judge_model, judge.max_response_length) == ([f"{folder}/val.jsonl"], f"{folder}/base", 10)
    assert monitor_flags().parse_args(found["verl.monitor"]).runs == [str(run)]

    caplog.clear()
    go(folder, "seqkd", *settings)
    again = said(caplog)
    assert (
        again[0] == "nothing is left to train: 2 of 2 steps of SeqKD are made" and "building models" not in caplog.text
    )
    assert again[1:3] == lines[1:3] and "more of trainer.total_training_steps" in again[3] and again[4:] == lines[3:]

    # A validation that a crash kept from being logged is made, and then there is nothing left.
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    caplog.clear()
    go(folder, "seqkd", *settings)
    assert "building models" in caplog.text and said(caplog)[0].startswith("done: 2 of 2 steps")
    assert "val/sft_loss" in logged_metrics(run)[2]

    caplog.clear()
    go(folder, "seqkd", *settings, steps=3)
    assert said(caplog)[0].startswith("done: 3 of 3 steps")


def test_a_warmup_of_the_discriminator_alone_leads_to_gad_and_to_no_merger(folder, caplog):
    caplog.set_level("INFO")
    run = go(
        folder, "one-warmup", "stage=warmup", f"critic.model.path={folder}/base", "trainer.critic_warmup=2",
        "trainer.test_freq=-1", "critic.held_out_prompts=0",
    )  # fmt: skip
    lines = said(caplog)
    assert lines[0].startswith("done: 2 of 2 steps of warmup") and "d_acc in the last step" in lines[1]
    found = commands(lines)
    assert sorted(found) == ["script", "verl.monitor"] and found["script"][1].endswith("gpt5-8b-gad-gspo.sh")
    newest = f"{run}/global_step_2"
    assert found["script"][2:8] == [
        "--model", f"{newest}/actor", "--reward_model", f"{newest}/critic", "--exp_name", "one-gad",
    ]  # fmt: skip


def test_commands_are_named_as_the_user_called_and_a_pipelines_stage_offers_none(tmp_path, monkeypatch):
    root = tmp_path / "it" / "seqkd"
    config = Trainer(root, VALUES).config
    monkeypatch.setattr(sys, "argv", ["verl train", "stage=seqkd"])
    next_stage, merger, *_ = closing_commands(config, root, 4, 10)
    assert next_stage.startswith(
        f"the next stage, warmup: verl train stage=warmup actor_rollout_ref.model.path={root}/global_step_4/actor "
    )
    assert merger.startswith(f"for transformers and vLLM: verl merge --local_dir {root}/global_step_4/actor ")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "main_ppo.py")])
    next_stage, merger, *_ = closing_commands(config, root, 4, 10)
    assert f"scripts/train/gpt5-8b-warmup-gspo.sh --model {root}/global_step_4/actor " in next_stage
    assert ": python -m verl.model_merger --local_dir " in merger
    # What a pipeline that was called as `verl distill` puts into its stages' environment.
    monkeypatch.setattr(sys, "argv", ["verl distill"])
    environment = for_children()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "main_ppo.py")])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (root / "metrics.jsonl").touch()
    assert closing_commands(config, root, 4, 10) == [] and report_command(root) is None
    monkeypatch.delenv(WHAT_NEXT)
    assert report_command(root).startswith("a report of it: verl monitor ")


# ---- every way to end


def ended(trainer, resumed=None):
    """The real loop, with what is said around it."""
    with trainer.signals.taken(), end_said(trainer.config, trainer, resumed):
        trainer.fit()


def test_an_early_stop(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = Trainer(tmp_path, VALUES, early_stop_patience=2)
    ended(trainer)
    lines = said(caplog)
    assert lines[0].startswith("stopped early: 4 of 10 steps of SeqKD are made")
    assert lines[2 if lines[1].startswith("reached") else 1] == (
        f"newest checkpoint: {tmp_path}/global_step_4; best: {tmp_path}/best, of step 2, val/x 0.500"
    )
    assert "to go on after all: the same command with trainer.early_stop_patience above 2, or null" in lines
    assert commands(lines)["verl.model_merger"][1] == f"{tmp_path}/best/actor" and len(lines) <= 8

    # Seen before the start only where its last validation was logged too.
    resumed = Path(find_latest_ckpt_path(tmp_path))
    assert nothing_left(trainer.config, 10, resumed) is None
    (tmp_path / "metrics.jsonl").write_text('x\n{"step": 4, "data": {"val/x": "nan"}}\n[]\n')
    assert nothing_left(trainer.config, 10, resumed).how == "nothing is left to train after an early stop"
    patient = Trainer(tmp_path, VALUES, early_stop_patience=3)
    assert nothing_left(patient.config, 10, resumed) is None
    assert nothing_left(Trainer(tmp_path / "other", VALUES).config, 4, resumed) is None


@pytest.mark.parametrize(("save", "newest", "again"), [(True, 3, ""), (False, 2, "; 1 step made since are made again")])
def test_a_signal_between_steps_and_at_once(tmp_path, caplog, save, newest, again):
    caplog.set_level("INFO")
    trainer = Trainer(tmp_path, VALUES, best_metric=None, test_freq=-1, save_freq=2, save_on_signal=save)
    trainer.signals, step = RunSignals(), trainer._make_step

    def make_step(prompts, timed):
        # In the third step where it waits for the step's end; else at once, in the fourth.
        if trainer.global_step == (2 if save else 3):
            os.kill(os.getpid(), signal.SIGTERM)
        step(prompts, timed)

    trainer._make_step = make_step
    with pytest.raises(EndedBySignal):
        ended(trainer)
    assert said(caplog)[0].startswith(f"ended by SIGTERM{'' if save else ' at once'}: 3 of 10 steps of SeqKD are made")
    assert said(caplog)[1:3] == [
        f"newest checkpoint: {tmp_path}/global_step_{newest}",
        f"to go on: the same command, which begins with the weights of step {newest}{again}",
    ]


def test_an_alarm_and_an_error(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = Trainer(tmp_path, VALUES, best_metric=None, test_freq=-1, on_alarm="stop")
    log = trainer._log

    def alarmed(tracking, metrics):
        log(tracking, metrics)
        if trainer.global_step == 1:
            trainer.monitor.stopped = "an alarm's sentence"

    trainer._log = alarmed
    with pytest.raises(StoppedByAlarm):
        ended(trainer)
    assert (
        said(caplog)[0].startswith("stopped by an alarm: 2 of 10 steps")
        and "begins with the weights of step 2" in said(caplog)[2]
    )
    caplog.clear()
    broken = Trainer(tmp_path, VALUES, crash=4, best_metric=None, test_freq=-1, resume_mode="resume_path",
                     resume_from_path=f"{tmp_path}/global_step_2")  # fmt: skip
    with pytest.raises(Crash):
        ended(broken)
    assert said(caplog)[0].startswith("failed: 4 of 10 steps")
    assert said(caplog)[2] == (
        "to go on: the same command with trainer.resume_mode=auto, which begins with the weights of step 2; 2 steps "
        "made since are made again"
    )
    caplog.clear()
    with pytest.raises(Crash):
        ended(Trainer(tmp_path / "new", VALUES, crash=0, best_metric=None, test_freq=-1))
    assert said(caplog)[1:] == [
        f"this run has saved no checkpoint in {tmp_path}/new", "to go on: the same command, which begins anew",
    ]  # fmt: skip
    caplog.clear()
    ended(Trainer(tmp_path / "look", VALUES, best_metric=None, val_only=True))
    assert said(caplog) == []
