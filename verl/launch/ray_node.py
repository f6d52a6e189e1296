"""Ray on this machine, as a node of a cluster."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import suppress

import psutil

from verl.utils.signals import out_of_reach
from verl.utils.socket_folder import session_folder

LAST_LINES = 12


class RayNode:
    """`ray start --block`, out of the reach of signals: who ends a whole group or job (Slurm) ends this launcher, and
    the run still saves.

    Args:
        arguments: for `ray start`.
    """

    def __init__(self, arguments: list[str]):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        folder = session_folder()
        if folder is not None:
            command.append(f"--temp-dir={folder}")
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the node
        with out_of_reach():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> str | None:
        """None while it is at work; else its last words."""
        if self._process.poll() is None:
            return None
        self._output.seek(0)
        lines = [line.rstrip() for line in self._output if line.strip()]
        return "\n".join(["Ray has ended on this node. Its last words:", *lines[-LAST_LINES:]])

    def end(self) -> None:
        """Kill Ray here, with all that it has started."""
        with suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            everything = [own, *own.children(recursive=True)]
            for process in everything:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(everything, timeout=5)
        self._process.wait()
        self._output.close()
