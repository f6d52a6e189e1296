"""Two Ray nodes on this machine, as `ray start` makes them by hand, each with processes of its own."""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.runs import Run

CPUS = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Cluster:
    """Nodes by their names, `alpha` the head; what they and their ranks start carries its node's mark.

    Args:
        folder: for logs.
        temporary: Ray's own; a path that is short enough for sockets.
    """

    def __init__(self, folder: Path, temporary: str):
        self.folder, self.port = folder, free_port()
        self.environment = {
            "RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)
        }  # fmt: skip
        self.nodes: dict[str, Run] = {}
        self._start("alpha", ["--head", f"--port={self.port}", "--include-dashboard=false", "--disable-usage-stats"])
        self.address = self._address()

    def join(self, name: str, cpus: int = CPUS, before: list[str] | None = None, **environment: str) -> Run:
        """A further node; `before` stands in front of its command."""
        return self._start(name, [f"--address={self.address}"], cpus, before, **environment)

    def _start(
        self, name: str, arguments: list[str], cpus: int = CPUS, before: list[str] | None = None, **environment: str
    ) -> Run:
        command = [*(before or []), sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += [f"--node-name={name}", f"--num-cpus={cpus}", "--num-gpus=0"]
        run = Run(command, self.folder / f"{name}.log", **self.environment | environment)
        self.nodes[name] = run
        run.wait_until(lambda: "Ray runtime started" in run.log.read_text(), f"{name} is up")
        return run

    def _address(self) -> str:
        said = (Path(self.environment["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").read_text()
        assert said.endswith(f":{self.port}")
        return said


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A head, and what joins it; all of it ends with the block."""
    temporary = tempfile.mkdtemp(prefix="n", dir="/tmp")
    made = Cluster(folder, temporary)
    try:
        yield made
    finally:
        for run in reversed(made.nodes.values()):
            run.stop()
        shutil.rmtree(temporary, ignore_errors=True)
