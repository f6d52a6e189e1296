"""What a run on real Ray writes to files and to terminals, and what it keeps from them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.runs import REPOSITORY, arguments
from tests.tiny import write_data

pytestmark = [pytest.mark.faults, pytest.mark.distributed]

# What a discriminator's loss of a user's own may print in every rank.
LOSS = r"""
import logging
import os
import torch

def noisy(scores, **constants):
    if "RANK" in os.environ:
        print("\x1b[31mnoise of a library\x1b[0m")
        logging.getLogger("verl.mine").warning("look \x1b[2J at this\nand that")
        print("ERROR 11-28 10:00:00 engine: something broke")
    return torch.relu(1 - (scores.teacher - scores.student)).mean(), {}
"""
# One that works where settings are checked, and breaks in the ranks.
BROKEN = """
import os

def broken(scores):
    if "RANK" in os.environ:
        raise ZeroDivisionError("mine")
    return (scores.student - scores.teacher).mean(), {}
"""
STEP = re.compile(r"step +\d+/4 \| d_acc ")


class Seen(NamedTuple):
    """What arrived on standard output and standard error, which are one at a terminal."""

    out: str
    err: str


def command(folder: Path, run: Path, *overrides: str) -> list[str]:
    val = folder / "val.jsonl"
    if not val.exists():
        write_data(val, rows=6)
    settings = [
        "stage=gad",
        "trainer.critic_warmup=4",
        "trainer.total_training_steps=4",
        "trainer.test_freq=2",
        f"critic.model.path={folder}/base",
        *overrides,
    ]
    return [
        sys.executable, "-m", "verl.trainer.main_ppo",
        *arguments(folder, run, *settings, f"data.val_files={val}", "trainer.logger=[console,file]"),
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return own | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "xterm"} | more


def at_a_terminal(argv: list[str], columns: int, folder: Path) -> str:
    """All that the command writes to a terminal of so many columns."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        argv, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment(), start_new_session=True
    )
    os.close(slave)
    said = b""
    # Linux says EIO when the other end is closed.
    with suppress(OSError):
        while part := os.read(master, 65536):
            said += part
    os.close(master)
    assert process.wait() == 0, said.decode(errors="replace")
    return said.decode().replace("\r\n", "\n")


def controls(text: str) -> set[str]:
    return {character for character in text if not character.isprintable()} - {"\n", "\t"}


def test_files_get_plain_lines_and_what_ranks_print_goes_to_the_runs_folder(folder, tmp_path):
    """Two ranks, which say the same."""
    (tmp_path / "mine.py").write_text(LOSS)
    run = tmp_path / "run"
    argv = command(
        folder, run, "trainer.n_gpus_per_node=2", f"critic.discriminator.loss={tmp_path}/mine.py:noisy"
    )  # fmt: skip
    done = subprocess.run(argv, capture_output=True, cwd=tmp_path, env=environment())
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert controls(out) == controls(err) == set()
    lines = err.splitlines()
    # All that stands before the first step.
    before = err[: err.index(" s from the command to the end of the first step")]
    assert before.count("\n") < 40, before
    for begun in ("settings are read, after", "reading data ...", "starting Ray ...", "starting 2 ranks ...",
                  "loading the student from", "building the hf engine ...", "loading the discriminator from",
                  "sampling the held-out answers ...", "validating at step 0 ..."):  # fmt: skip
        assert begun in err
    assert re.search(r"(?m)^driver  starting Ray +\d+\.\d$", err)
    assert re.search("warmup (worked|did not work): the discriminator tells", err)
    assert f"--model {run}/global_step_4/actor --reward_model {run}/global_step_4/critic" in err
    # Libraries' noise is in a file; errors, and what the package warns of, are on the terminal too.
    ranks = (run / "logs" / "ranks.log").read_text()
    assert "noise of a library" in ranks and "\x1b" not in ranks
    assert "noise of a library" not in out + err and "Token authentication" not in err
    warned = [line for line in lines if "look \ufffd[2J at this" in line]
    assert warned and all(re.search(r"WARNING verl.mine: .*\[rank \d\]: look", line) for line in warned)
    assert len(warned) < ranks.count("at this"), "said once for both ranks"
    assert "and that" in err and "engine: something broke" in err
    assert "is not kept" not in err and json.loads((run / "run.json").read_text())["starts"][0]["preset"] == "gad"
    everything = (run / "logs" / "driver.log").read_text()
    assert "Token authentication" in everything and "starting Ray ..." in everything
    shown = [line for line in out.splitlines() if line.startswith("step ")]
    assert shown[0].startswith("step 1/4 |") and shown[-1].startswith("step 4/4 |")
    assert all(STEP.match(line) and len(line) <= 160 for line in shown)
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("validation")] == [
        f"validation at step {step}" for step in (0, 2, 4)
    ]


@pytest.mark.parametrize("columns", [160, 80])
def test_a_terminal_gets_a_bar_below_lines_that_fit(folder, tmp_path, columns):
    said = at_a_terminal(command(folder, tmp_path / "run"), columns, tmp_path)
    # colorama, which Ray loads, sets the colours back when a process ends.
    said = said.removesuffix("\x1b[0m")
    assert controls(said) == {"\r"}, "the bar's"
    assert said[: said.index("warmup:   0%")].count("\n") < 42
    rows = re.split("[\r\n]", said)
    steps = [row for row in rows if row.startswith("step ")]
    assert steps and all(STEP.match(row) and len(row) <= columns for row in steps)
    bars = [row for row in rows if row.startswith("warmup:")]
    assert all(len(row) <= columns for row in bars)
    # One bar, with the time that is left.
    assert re.search(r"4/4 \[\d\d:\d\d<00:00", bars[-1]) and bars[-1].startswith("warmup: 100%")


def test_a_run_that_fails_says_where_the_rest_is(folder, tmp_path):
    (tmp_path / "mine.py").write_text(BROKEN)
    run = tmp_path / "run"
    argv = command(folder, run, f"critic.discriminator.loss={tmp_path}/mine.py:broken")
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 1
    assert f"the run failed; {run}/logs/ranks.log has what its ranks printed" in done.stderr
    assert "ZeroDivisionError" in done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]
    assert "ZeroDivisionError" in (run / "logs" / "driver.log").read_text()
    assert controls(done.stderr) == set()
