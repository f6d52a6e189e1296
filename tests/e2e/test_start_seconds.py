"""What a start took: said once and kept in `run.json`, of each run by itself."""

from __future__ import annotations

import json
import logging

import pytest

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
    assert sum(record.getMessage().startswith("start: ") for record in caplog.records) == 1


def test_a_run_that_ends_before_its_first_step_leaves_nothing_to_the_next(run):
    with pytest.raises(ValueError, match="profile_steps"):
        run("refused", "trainer.profile_steps=[9]")
    assert startup.conclude() is None
    run("looks", "trainer.val_only=True")
    assert startup.conclude() is None
    driver = seconds_of(run("next", steps=1))["driver"]
    assert "building models: the student's" in driver and not any(name.startswith("validating") for name in driver)
