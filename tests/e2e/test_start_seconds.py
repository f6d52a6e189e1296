"""What a start took: said once and kept in `run.json`, of each run by itself."""

from __future__ import annotations

import json
import logging

import pytest
import ray

from tests.e2e.running import train
from verl.trainer.ppo.checkpointing import Checkpoints
from verl.utils import startup

pytestmark = pytest.mark.e2e


def seconds_of(run) -> dict:
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    return start["seconds_to_first_step"]


def test_the_parts_of_a_start_add_up_and_are_said_once(run, caplog):
    with caplog.at_level(logging.INFO):
        seconds = seconds_of(run("whole", steps=2))
    parts = ["building models: the student's", "building models: the discriminator's", "the first step", "rest"]
    driver = seconds["driver"]
    assert driver.keys() >= set(parts) and driver["the first step"] > 0
    assert sum(driver[name] for name in parts) <= seconds["total"] + 0.01
    # In one process what the rank did is part of the driver's; what it compiled is its own, and nothing here.
    assert seconds["rank 0"] == {"compiling layers": 0}
    (told,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("start: "))
    shown = [line.split() for line in told.splitlines()[2:]]
    # Phases of less than half a second, or a twentieth of the whole, are in the rest; indented are parts of others.
    top = [float(line.split()[-1]) for line in told.splitlines()[2:] if line[8] != " "]
    assert shown[-1][:2] == ["driver", "rest"] and min([1.0, *top[:-1]]) >= 0.5
    assert sum(top) == pytest.approx(seconds["total"], abs=0.05 * len(top) + 0.05)


def test_the_checkpoint_of_a_first_step_is_no_part_of_the_start(run, monkeypatch):
    """The seconds are kept before it is written: the start of a large model would be minutes longer."""
    known, write = [], Checkpoints.write

    def look(self, *args):
        known.append(seconds_of(self.root)["total"])
        return write(self, *args)

    monkeypatch.setattr(Checkpoints, "write", look)
    total = seconds_of(run("saved", steps=1))["total"]
    assert known == [total]


def test_a_run_that_ends_before_its_first_step_leaves_nothing_to_the_next(run):
    with pytest.raises(ValueError, match="profile_steps"):
        run("refused", "trainer.profile_steps=[9]")
    assert startup.conclude() is None
    run("looks", "trainer.val_only=True")
    assert startup.conclude() is None
    driver = seconds_of(run("next", steps=1))["driver"]
    assert "building models: the student's" in driver and not any(name.startswith("validating") for name in driver)


@pytest.mark.distributed
def test_what_ranks_do_while_the_driver_looks_at_data_is_theirs(folder):
    """On Ray: the rank has loaded libraries and read files by itself, and the driver's parts add up without that."""
    overrides = "stage=seqkd", "trainer.total_training_steps=1", "trainer.val_before_train=False"
    seconds = seconds_of(train(folder, "ray", *overrides))
    driver, rank = seconds["driver"], seconds["rank 0"]
    assert (
        list(driver).index("starting Ray") < list(driver).index("reading data") < list(driver).index("starting 1 rank")
    )
    assert rank["loading libraries"] > 0 and rank["reading the models' files"] > 0
    assert "loading libraries" not in driver
    top = [name for name in driver if not name.startswith(("loading the", "comparing the"))]
    assert sum(driver[name] for name in top) == pytest.approx(seconds["total"], abs=0.05)


@pytest.mark.distributed
def test_bad_rows_end_a_run_whose_ranks_have_begun(folder):
    """Nobody's Ray is left, and in a caller's own the places are free again."""
    (folder / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    overrides = "stage=seqkd", "trainer.total_training_steps=1", f"data.train_files={folder}/bad.jsonl"
    with pytest.raises(ValueError, match="there is no column 'content'"):
        train(folder, "bad", *overrides)
    assert not ray.is_initialized()
    ray.init(num_cpus=1, num_gpus=0, include_dashboard=False, address="local", log_to_driver=False)
    try:
        with pytest.raises(ValueError, match="there is no column 'content'"):
            train(folder, "bad", *overrides)
        train(folder, "good", "stage=seqkd", "trainer.total_training_steps=1", "trainer.val_before_train=False")
    finally:
        ray.shutdown()
