"""Many seeds of the quick start: what is run, kept and printed. Training itself is `tests/faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from examples.quickstart import seeds
from examples.quickstart.run import REPOSITORY, RESULTS, STAGES

# A quick start that takes no time: seed 2 fails, and seed 1's discriminator wins from its step 10 on.
FAKE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
parser.add_argument("--seed", type=int)
options, rest = parser.parse_known_args()
print("started", rest)
if options.seed == 2:
    sys.exit(7)
for stage in ("SeqKD", "warmup", "GAD"):
    folder = options.out / "checkpoints" / "gad" / stage
    folder.mkdir(parents=True)
    wins = options.seed == 1 and stage == "GAD"
    rows = [
        {"step": step, "data": {"critic/d_acc": 0.99 if wins and step > 9 else 0.7, "actor/pg_loss": 0.1}}
        for step in range(40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
exact = {"base": 0.0, "SeqKD": 0.8, "warmup": 0.8, "GAD": [0.82, 0.86][options.seed]}
(options.out / "results.json").write_text(json.dumps({name: {"exact": value} for name, value in exact.items()}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Its folder takes the repository's place."""
    package = tmp_path / "fake" / "examples" / "quickstart"
    package.mkdir(parents=True)
    (package / "run.py").write_text(FAKE)
    monkeypatch.setattr(seeds, "REPOSITORY", tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    return tmp_path / "out"


def test_the_table_and_what_is_left_to_do(fake, capsys):
    command = ["--out", str(fake), "--jobs", "2", "--steps", "5"]
    assert seeds.main([*command, "--seeds", "3"]) == seeds.FAILED
    said = capsys.readouterr().out
    assert f"seed 2: exit code 7, see {fake}/seed_2.log" in said
    log = (fake / "seed_0.log").read_text()
    assert log == "started ['--steps', '5', '--ranks', '2', 'ray_kwargs.ray_init.num_cpus=2']\n"
    lines = (fake / "seeds.txt").read_text().splitlines()
    assert lines[1].split() == ["0", "0.0%", "80.0%", "80.0%", "82.0%", "-"]
    # The median of 8 values is above 0.9 when 5 of them are, first at step 14.
    assert lines[2].endswith("86.0%  GAD: discriminator_too_strong from step 14 to the end (0.99)")
    assert lines[3].split() == ["2", "not", "finished"]
    assert lines[4].split() == ["mean", "0.0%", "80.0%", "80.0%", "84.0%"]
    # Gains of 2 and 6 points: their standard deviation is sqrt(8), over sqrt(2).
    assert lines[-3] == "GAD gains +4.0 points of exact answers over warmup (standard error 2.0, 2 seeds)"
    assert lines[-1] == "alarms in 1 of 6 stages, discriminator_too_strong 1 times"
    # Finished ones are kept as they are, and the one that failed is tried again.
    (fake / "seed_0.log").write_text("kept")
    assert seeds.main([*command, "--seeds", "3"]) == seeds.FAILED
    assert capsys.readouterr().out.startswith("seed 2: exit code 7") and (fake / "seed_0.log").read_text() == "kept"
    assert seeds.main([*command, "--seeds", "2"]) == seeds.ALARMS
    assert seeds.main([*command, "--seeds", "1"]) == seeds.NO_ALARM


def test_its_names_are_those_of_the_quick_start():
    assert RESULTS == "results.json" and [stage.name for stage in STAGES] == ["SeqKD", "warmup", "GAD"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_ended_it_leaves_no_job_behind(tmp_path, how):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.quickstart.seeds", "--out", str(out), "--seeds", "3"],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (out / "seed_0.log").exists() or "[1/4]" not in (out / "seed_0.log").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(timeout=60) != 0
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(out) not in listed
    assert not (out / "seed_1.log").exists()
