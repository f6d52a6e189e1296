"""Where a process is: the Python stacks of its threads, asked from outside, and what the system knows of it."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

# A process that does not know what it means ignores it, by the system's default.
ASK = signal.SIGURG
ANSWER_S = 3.0
_FILE = "verl_stacks"


def answer_when_asked() -> None:
    """From here on, this process answers `ASK` with its stacks, in C code too: no Python runs for it, and no lock is
    taken. They go to a file in memory, which `report` finds. On Linux only."""
    if sys.platform == "linux":
        faulthandler.register(ASK, file=os.memfd_create(_FILE), all_threads=True, chain=False)


def own_stacks() -> str:
    """The stacks of this process's threads, the innermost call first; a full disk keeps nobody from them."""
    in_memory = hasattr(os, "memfd_create")
    with open(os.memfd_create("verl_own_stacks"), "w+") if in_memory else tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """This machine's processes that were started with `name=value` in their environment, the oldest first; only those
    of one's own can be seen."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(name) == value:
                # Asked for here: by the time they are sorted it may have ended.
                found.append((process.create_time(), process.pid, process))
    return [process for *_, process in sorted(found)]


def state(process: psutil.Process) -> str:
    """What the system says of it: running, sleeping, stopped, disk-sleep, ..."""
    try:
        return process.status()
    except psutil.Error:
        return "gone"


def report(process: psutil.Process) -> str:
    """Its number, its state, and its stacks if it answers within `ANSWER_S`; a process that is stopped cannot."""
    try:
        with process.oneshot():
            cpu = sum(process.cpu_times()[:2])
            lines = [f"process {process.pid}, {process.status()}, {process.num_threads()} threads, {cpu:.0f} s of CPU"]
    except psutil.Error:
        return f"process {process.pid} is gone"
    stacks = _ask(process)
    return "\n".join([*lines, stacks or "It gave no stacks when it was asked for them."])


def _ask(process: psutil.Process) -> str:
    with suppress(psutil.Error, OSError):
        file = _answers_of(process)
        if file is None:
            return ""
        known = len(file.read_bytes())
        process.send_signal(ASK)
        deadline, text = time.monotonic() + ANSWER_S, b""
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, text = text, file.read_bytes()[known:]
            # Written line by line: whole when nothing more comes.
            if text and text == before:
                break
        return text.decode(errors="replace").rstrip()
    return ""


def _answers_of(process: psutil.Process) -> Path | None:
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(descriptor).startswith(f"/memfd:{_FILE}"):
                return descriptor
    return None
