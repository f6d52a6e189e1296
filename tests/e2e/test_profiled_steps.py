"""`trainer.profile_steps`: which steps are traced, by whom, and that others are left alone."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from tests.e2e.running import read_metrics, train
from verl.trainer.config import ConfigError
from verl.utils import profiling

pytestmark = pytest.mark.e2e


def written(run) -> dict[str, list[str]]:
    return {folder.name: sorted(file.name for file in folder.iterdir()) for folder in (run / "profiles").iterdir()}


def names_in(file) -> tuple[list[str], set[str]]:
    """The processes and all events of a trace."""
    with gzip.open(file, "rt") as trace:
        events = json.load(trace)["traceEvents"]
    return [event["args"]["name"] for event in events if event["name"] == "process_name"], {e["name"] for e in events}


def assert_same_learning(one, other):
    ours, theirs = read_metrics(one), read_metrics(other)
    for step, metrics in theirs.items():
        for name in (name for name in metrics if not name.startswith(("timing", "perf"))):
            assert ours[step][name] == metrics[name], (step, name)


@pytest.mark.distributed
def test_every_rank_and_the_driver_are_traced(folder, caplog):
    """On real Ray; what is learned is the same to the last bit."""
    settings = ("stage=seqkd", "trainer.n_gpus_per_node=2", "trainer.total_training_steps=3", "trainer.test_freq=-1")
    plain = train(folder, "two_plain", *settings)
    with caplog.at_level(logging.INFO):
        run = train(folder, "two", *settings, "trainer.profile_steps=[2]")
    files = ["driver.json.gz", "driver.txt", "rank_0.json.gz", "rank_0.txt", "rank_1.json.gz", "rank_1.txt"]
    assert written(run) == {"step_2": files}
    step = run / "profiles" / "step_2"
    for rank in (0, 1):
        processes, events = names_in(step / f"rank_{rank}.json.gz")
        assert processes[0] == f"rank {rank} of 2"
        assert "actor_rollout.update_actor" in events and any("Adam" in name for name in events)
    processes, events = names_in(step / "driver.json.gz")
    assert processes[0] == "driver" and "update_actor" in events
    assert [str(step) in record.getMessage() for record in caplog.records if "is profiled" in record.msg] == [True]
    assert not (plain / "profiles").exists()
    assert_same_learning(run, plain)


@pytest.fixture
def made(monkeypatch):
    """How many profiler objects were made."""
    count = []
    original = profiling.torch_profile

    def counted(*args, **kwargs):
        count.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(profiling, "torch_profile", counted)
    return count


def test_in_process_steps_that_are_not_named_make_no_profiler(run, made):
    plain = run("unprofiled")
    assert made == []
    profiled = run("profiled", "trainer.profile_steps=[2,1]")
    assert len(made) == 2
    assert written(profiled) == {f"step_{step}": ["rank_0.json.gz", "rank_0.txt"] for step in (1, 2)}
    assert "CriticWorker." in (profiled / "profiles" / "step_1" / "rank_0.txt").read_text()
    assert_same_learning(profiled, plain)


def test_a_trace_that_cannot_be_written_ends_nothing(run, folder, made, caplog):
    (folder / "runs" / "full").mkdir(parents=True)
    (folder / "runs" / "full" / "profiles").write_text("")
    steps = read_metrics(run("full", "trainer.profile_steps=[1]"))
    assert sorted(steps) == [0, 1, 2] and len(made) == 1
    assert "the trace of rank 0 of 1, with the driver is not kept in" in caplog.text


def test_a_resumed_run_traces_what_is_left(run, made, caplog):
    run("resumed", steps=2)
    resumed = run("resumed", "trainer.profile_steps=[1,3]", steps=4)
    assert len(made) == 1 and list(written(resumed)) == ["step_3"]
    assert "goes on at step 2, so that 1 is made already and not traced" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (["trainer.profile_steps=[1,2,1]"], ConfigError, "names 1 several times"),
        (["trainer.profile_steps=[-1]"], ConfigError, "trainer.profile_steps"),
        (["trainer.profile_steps=[1]", "trainer.val_only=True"], ConfigError, "makes none"),
        (["trainer.profile_steps=[2,3,9]"], ValueError, "expected steps of 0 to 2, of which this run has 3, got 3, 9"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused_before_the_start(run, folder, settings, error, said):
    with pytest.raises(error, match=said):
        run("refused", *settings)
    assert not (folder / "runs" / "refused" / "metrics.jsonl").exists()
