"""What a node says of itself before a run starts there.

Runs on nodes where this package may be missing or another one, so it travels by value and imports nothing but the
standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

SEEN_WITHIN_S = 5.0
CONNECT_S = 10.0
TRIES = 200


def versions(packages: list[str]) -> dict[str, str | None]:
    """Of Python and of packages, as they are installed; None for one that is not."""
    found: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def code_of(package: str) -> tuple[str, str] | None:
    """The folder of a package and a digest of its Python and YAML files; None where it cannot be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".yaml")):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return str(folder), digest.hexdigest()


def sizes(path: str) -> dict[str, int] | str:
    """The files of a folder, or the file itself, by name, with their bytes; or why it cannot be read."""
    here = Path(path)
    try:
        files = [here] if here.is_file() else sorted(file for file in here.iterdir() if file.is_file())
        for file in files:
            with file.open("rb") as opened:
                opened.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return {file.name: file.stat().st_size for file in files}


def shares(folder: str, asked: str, answer: str) -> str | None:
    """Whether a file that the driver has written is seen here, and one written here for the driver to see; None, or
    what is wrong."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not Path(folder, asked).exists():
        if time.monotonic() > deadline:
            return "a file that the driver writes there is not seen"
        time.sleep(0.1)
    try:
        Path(folder, answer).write_text(asked)
    except OSError as error:
        return f"it cannot be written ({error.strerror or error})"
    return None


def listen(address: str, ports: range) -> socket.socket | None:
    """A socket that listens at one of the ports; None where none is free."""
    for port in random.SystemRandom().sample(ports, min(TRIES, len(ports))):
        try:
            return socket.create_server((address, port))
        except OSError:
            continue
    return None


class NodeProbe:
    """An actor on a node, which is asked once and then goes."""

    def look(self, packages: list[str], paths: list[str], folder: str, asked: str, answer: str) -> dict:
        """All of the above, and the free bytes where Ray keeps what does not fit into memory."""
        return {
            "versions": versions(packages),
            "code": code_of("verl"),
            "paths": {path: sizes(path) for path in paths},
            "shares": shares(folder, asked, answer),
            "free": shutil.disk_usage(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").free,
        }

    def listen(self, address: str, ports: range) -> int | None:
        """A port at which this node can be reached from now on."""
        self._listening = listen(address, ports)
        return None if self._listening is None else self._listening.getsockname()[1]

    def reach(self, places: list[tuple[str, int]]) -> list[str | None]:
        """For each place None, or why no connection comes about."""
        said: list[str | None] = []
        for place in places:
            try:
                with socket.create_connection(place, timeout=CONNECT_S):
                    said.append(None)
            except OSError as error:
                said.append(error.strerror or str(error))
        return said
