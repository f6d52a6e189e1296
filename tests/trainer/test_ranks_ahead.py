"""The ranks' processes begin before models' files and data are looked at: what is told of both, and in which order."""

from __future__ import annotations

import logging

import pytest
import torch.distributed as dist

from tests.e2e.running import train
from tests.tiny import write_data, write_model
from verl.trainer.config import compose_config
from verl.trainer.in_process import InProcessRunner
from verl.trainer.ppo.folders import may_resume


class Cluster(ConnectionError):
    """It is not there."""


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "base")
    write_data(tmp_path / "train.jsonl", rows=8)
    write_data(tmp_path / "val.jsonl", rows=4)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


class Recorder(InProcessRunner):
    """Notes when the ranks begin, in the log; the machine that they would be on is there, or is not."""

    there = True

    def start(self, config):
        logging.getLogger("verl.tests").info("ranks begin")
        if not self.there:
            raise Cluster("no Ray answers")


class Without(Recorder):
    there = False


def begin(folder, caplog, *overrides, runner=Recorder):
    """The error of a run, if there is one, and the lines of its log that name what is looked at or begun."""
    error = None
    with caplog.at_level(logging.INFO):
        try:
            train(folder, "run", "stage=seqkd", "trainer.total_training_steps=1", *overrides,
                  run_with=lambda config: runner().run(config))  # fmt: skip
        except (OSError, ValueError) as raised:
            error = raised
    lines = [line for line in caplog.messages if line in ("ranks begin", "reading data ...") or "reading tok" in line]
    caplog.clear()
    return error, [line.split()[0] + " " + line.split()[1] for line in lines if line.endswith(("begin", "..."))]


def test_they_begin_once_before_files_and_rows_are_looked_at(folder, caplog):
    error, order = begin(folder, caplog)
    assert error is None and order == ["ranks begin", "reading tokenizer", "reading data"]
    # A second start may have nothing left to train, which the rows tell.
    error, order = begin(folder, caplog, "trainer.total_training_steps=2")
    assert error is None and order == ["reading tokenizer", "reading data", "ranks begin"]
    error, order = begin(folder, caplog, "trainer.total_training_steps=2")
    assert error is None and order == ["reading tokenizer", "reading data"]


def test_none_begins_where_files_are_missing(folder, caplog):
    error, order = begin(folder, caplog, f"actor_rollout_ref.model.path={folder}/no", "data.val_files=no.jsonl")
    assert order == ["reading tokenizer"]
    assert [part in str(error) for part in ("no.jsonl", "/no does not exist")] == [True, True]


def test_bad_data_are_told_and_not_the_cluster_that_is_missing_too(folder, caplog):
    (folder / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for runner in (Recorder, Without):
        error, order = begin(folder, caplog, runner=runner)
        assert "there is no column 'content'" in str(error) and order[0] == "ranks begin"
        assert error.before_the_start


def test_a_cluster_that_is_missing_is_told_after_the_data(folder, caplog):
    error, order = begin(folder, caplog, runner=Without)
    assert isinstance(error, Cluster) and order == ["ranks begin", "reading tokenizer", "reading data"]


def test_whether_a_run_may_go_on_from_a_checkpoint(folder):
    trainer = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    trainer += [f"trainer.default_local_dir={folder}/run", "trainer.device=cpu", "stage=seqkd"]
    assert not may_resume(compose_config(trainer).trainer)
    (folder / "run" / "global_step_1").mkdir(parents=True)
    assert may_resume(compose_config(trainer).trainer)
    assert not may_resume(compose_config([*trainer, "trainer.resume_mode=disable"]).trainer)
    (folder / "run" / "global_step_1").rmdir()
    named = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}/run/global_step_1"]
    assert may_resume(compose_config([*trainer, *named]).trainer)
