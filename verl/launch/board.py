"""What head and workers tell each other: a few words in the store of Ray's head."""

from __future__ import annotations

import secrets
import socket
import time
from typing import NamedTuple

from ray._raylet import Config, GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError, RayError

ROOM = b"verl.launch"
END, SIGNAL, GONE = b"end", b"signal", b"gone/"
ANSWER_S = 5.0


class WrongToken(ValueError):
    """This process' token is not the cluster's."""


class Member(NamedTuple):
    """A node that is in the cluster."""

    id: str
    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def listens(address: str) -> bool:
    """Whether anybody does, at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S):
            return True
    except OSError:
        return False


class Board:
    """The words, at a head that `listens`. WrongToken where it does not let this process in."""

    def __init__(self, address: str):
        # Ray has read its settings when it was imported, before the token was there.
        Config.initialize("")
        try:
            self._store = GcsClient(address=address)
            self._store.internal_kv_get(END, ROOM, timeout=ANSWER_S)
        except AuthenticationError as error:
            raise WrongToken(
                f"the token here is not that of the head at {address}: RAY_AUTH_TOKEN, or the file that --token_file "
                "or RAY_AUTH_TOKEN_PATH names, has to be the same on all nodes"
            ) from error

    def members(self) -> list[Member]:
        """The nodes that are alive, the head first."""
        nodes = self._store.get_all_node_info(timeout=ANSWER_S).values()
        alive = [node for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]
        return [
            Member(
                node.node_id.hex(),
                node.node_name if node.node_name != node.node_manager_address else node.node_manager_hostname,
                node.node_manager_address,
            )
            for node in sorted(alive, key=lambda node: (not node.is_head_node, node.node_manager_address))
        ]

    def say_end(self, code: int) -> None:
        """The run is over, with this exit code."""
        self._store.internal_kv_put(END, str(code).encode(), True, ROOM, timeout=ANSWER_S)

    def end(self) -> int | None:
        """The run's exit code, once it is over. Raises RayError if the head does not answer."""
        said = self._store.internal_kv_get(END, ROOM, timeout=ANSWER_S)
        return None if said is None else int(said)

    def say_signal(self, number: int, who: str) -> None:
        """A worker was told to end."""
        self._store.internal_kv_put(SIGNAL, f"{number} {who}".encode(), True, ROOM, timeout=ANSWER_S)

    def signal(self) -> tuple[int, str] | None:
        """The signal that a worker got, and who it is; once."""
        said = self._store.internal_kv_get(SIGNAL, ROOM, timeout=ANSWER_S)
        if said is None:
            return None
        self._store.internal_kv_del(SIGNAL, False, ROOM, timeout=ANSWER_S)
        number, _, who = said.decode().partition(" ")
        return int(number), who

    def say_gone(self) -> None:
        """A worker has read that the run is over."""
        self._store.internal_kv_put(GONE + secrets.token_hex(8).encode(), b"", True, ROOM, timeout=ANSWER_S)

    def wait_until_gone(self, count: int, seconds: float) -> None:
        """Return when so many workers know that the run is over, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while len(self._store.internal_kv_keys(GONE, ROOM, timeout=ANSWER_S)) < count and time.monotonic() < deadline:
            time.sleep(0.2)


UNANSWERED = (RayError, TimeoutError)
