"""Runs as users start them, in processes of their own, and what the system knows of these processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

REPOSITORY = Path(__file__).parents[2]
MARK = "RUN_OF_THE_TESTS"
# What a tiny run takes at most, on a machine that is busy with others.
PATIENCE_S = 240


def arguments(folder: Path, run: Path, *overrides: str) -> list[str]:
    """Settings of a run of `tests.tiny`'s model on `folder`'s data, whose folder is `run`."""
    return [
        "trainer.device=cpu",
        f"data.train_files={folder}/train.jsonl",
        "data.val_files=null",
        "data.train_batch_size=4",
        "data.max_prompt_length=28",
        "data.max_response_length=10",
        f"actor_rollout_ref.model.path={folder}/base",
        "actor_rollout_ref.rollout.n=3",
        f"trainer.default_local_dir={run}",
        f"trainer.experiment_name={run.name}",
        "trainer.logger=[file]",
        "algorithm.cut_answers=keep",
        # All of them, for tests to look at.
        "trainer.max_actor_ckpt_to_keep=null",
        "trainer.max_critic_ckpt_to_keep=null",
        *overrides,
    ]


class Run:
    """A command at work in a group of its own, all of whose processes carry a mark in their environment.

    Args:
        log: the file that its output goes to.
        environment: beside the tests' own.
    """

    def __init__(self, command: list[str], log: Path, **environment: str):
        self.log = log
        self.mark = uuid.uuid4().hex
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        marked = own | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", MARK: self.mark} | environment
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=marked, cwd=log.parent,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Those that live, whoever is their parent by now."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            # A zombie has no environment any more.
            return process.environ().get(MARK) == self.mark
        return False

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Return once it holds; AssertionError where the run ends before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self._said()}"
            assert time.monotonic() < deadline, f"waited in vain until {what}:\n{self._said()}"
            time.sleep(0.05)

    def _said(self) -> str:
        """What it printed, and where it is a trainer's what its ranks did."""
        ranks = self.log.with_suffix("") / "logs" / "ranks.log"
        return self.log.read_text() + (f"\nranks:\n{ranks.read_text()}" if ranks.exists() else "")

    def end(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(PATIENCE_S)

    def left_behind(self, seconds: float) -> list[str]:
        """The commands of its processes that still live after so many seconds at most."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return [process.name() for process in self.processes()]

    def stop(self) -> None:
        """Kill what lives of it."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


def lines_of(file: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return file.read_text().count("\n") if file.exists() else 0


def trainer(folder: Path, run: Path, *overrides: str, **environment: str) -> Run:
    """`python -m verl.trainer.main_ppo`, started."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments(folder, run, *overrides)]
    return Run(command, run.with_suffix(".log"), **environment)


class Listener(NamedTuple):
    """A TCP socket that others may connect to."""

    address: str
    port: int
    process: str


def listeners(processes: list[psutil.Process]) -> list[Listener]:
    """What these processes listen on, as the kernel's own tables have it."""
    addresses = _listening("/proc/net/tcp", socket.AF_INET) | _listening("/proc/net/tcp6", socket.AF_INET6)
    found = []
    for process in processes:
        # A process may end while it is looked at.
        with suppress(OSError, psutil.Error):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    inode = os.readlink(descriptor).removeprefix("socket:[").removesuffix("]")
                    if inode in addresses:
                        found.append(Listener(*addresses[inode], process.name()))
    return found


def _listening(table: str, family: int) -> dict[str, tuple[str, int]]:
    """Address and port by inode, of the sockets in the state LISTEN."""
    found = {}
    for line in Path(table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            host, port = fields[1].split(":")
            # The table has words of four bytes in the machine's order.
            raw = b"".join(int(host[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(host), 8))
            found[fields[9]] = socket.inet_ntop(family, raw).removeprefix("::ffff:"), int(port, 16)
    return found
