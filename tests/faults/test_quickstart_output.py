"""The quick start as a user starts it, its stages cut short: what it writes to a file, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest

from examples.quickstart.run import REPOSITORY, RESULTS, STAGES

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


def test_a_start_is_short_and_files_hold_no_control_characters(tmp_path):
    """By way of `seeds.py`, whose seed writes both streams to one file."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.quickstart.seeds", "--seeds", "1", "--steps", "3", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    first = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True)
    said = (out / "seed_0.log").read_bytes()
    assert first.returncode in (0, 1), said.decode()
    assert not set(said + first.stdout + first.stderr) & (set(range(32)) - {ord("\n"), ord("\t")})
    start, *stages = re.split(r"(?m)^\[\d/4\] (?:SeqKD|warmup|GAD): ", said.decode())
    assert start.count("\n") < 40 and len(stages) == 3
    for text in stages:
        before = text[: text.index("step 1/3 |")]
        assert before.count("\n") < 40, before
        assert "is not kept" not in before and "Traceback" not in text
    # The grades, and what the report of such a run shows.
    folder = out / "seed_0"
    assert list(json.loads((folder / RESULTS).read_text())) == ["base", "SeqKD", "warmup", "GAD"]
    for stage in STAGES:
        run = folder / "checkpoints" / "gad" / stage.name
        assert json.loads((run / "run.json").read_text())["starts"][0]["preset"] == stage.name.lower()
        answers = pd.read_parquet(run / "val_samples" / "step_3.parquet")
        assert len(answers) == 320 and answers["teacher"].str.len().min() > 0
        assert answers["score"].notna().all() == answers["teacher_score"].notna().all() == (stage.name != "SeqKD")
    # It is finished: another call trains nothing.
    table = first.stdout.decode()
    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert again.stdout == table.removeprefix("seed 0: done\n") and (out / "seed_0.log").read_bytes() == said
