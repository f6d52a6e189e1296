"""Joining a Ray cluster or starting one on this machine, and saying in time what stands in the way."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader

from verl.utils.socket_folder import session_folder
from verl.utils.stalls import end_children

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 20
END_S = 30
LOOPBACK = "127.0.0.1"
# By itself Ray has its workers yield to everything else (15): beside others' work on the machine training would halt.
NICENESS = "RAY_worker_niceness"


def join_or_start(address: str | None, num_cpus: int | None, nodes: int = 1) -> None:
    """Join the cluster at `address`, or at RAY_ADDRESS; without either start one on this machine alone.

    A run of several nodes joins the cluster that was last started on this machine where neither is given.

    Raises:
        ConnectionError: no Ray of this version answers there; names where the address came from.
    """
    origin = "ray_kwargs.ray_init.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    if not address and nodes == 1:
        start_alone(num_cpus)
        return
    if not address:
        address, origin = _started_here(nodes)
    if address not in ("auto", "local") and "://" not in address:
        check_answers(address, origin)
    logger.info("joining the Ray cluster at %s (%s)", address, origin)
    ray.init(address=address, configure_logging=not _log_is_set_up())


def _started_here(nodes: int) -> tuple[str, str]:
    """The address of the cluster last started on this machine, and where it is kept; ConnectionError without one."""
    file = ray._private.utils.get_ray_address_file(None)
    address = services.find_bootstrap_address(None)
    if address:
        return address, file
    raise ConnectionError(
        f"trainer.nnodes={nodes}: there is one node of the {nodes}, this machine ({services.get_node_ip_address()}): "
        f"neither ray_kwargs.ray_init.address nor RAY_ADDRESS names a Ray cluster, and {file} knows of none that was "
        "started here. Start one on all nodes (--head here and --worker ADDRESS there, or `ray start`: docs/nodes.md), "
        "or train on this machine alone (--nnodes 1)"
    )


def start_alone(num_cpus: int | None) -> None:
    """Start Ray on this machine: it listens on loopback alone, and answers those who have the run's token.

    The token is this start's own and lives in the environment of the run's processes, which only their owner can read,
    unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names another. Workers are as nice as this process, unless
    RAY_worker_niceness says how much nicer.

    Raises:
        OSError, ValueError: Ray's files have no place (`session_folder`).
        RuntimeError: this version of Ray listens elsewhere all the same; it has been stopped.
    """
    folder = session_folder()
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Where Ray has been used in this process before, it goes on with the token of then.
        AuthenticationTokenLoader.instance().reset_cache()
    os.environ.setdefault(NICENESS, "0")
    with _one_machine():
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address=LOOPBACK,
            _temp_dir=folder, configure_logging=not _log_is_set_up(),
        )  # fmt: skip
    address = ray.util.get_node_ip_address()
    if address != LOOPBACK:
        ray.shutdown()
        raise RuntimeError(
            f"Ray {ray.__version__} listens on {address} where {LOOPBACK} was asked for, open to the network: install "
            "one of the versions in requirements.txt"
        )


def _log_is_set_up() -> bool:
    """Whether Ray's log goes where the root's does (`log_to_terminal`), and Ray is to leave it there."""
    return logging.getLogger("ray").propagate


def stop() -> None:
    """Leave the cluster, and end it where `start_alone` began it. Its processes are killed if they do not end: one that
    is stopped would be waited for for ever."""
    killer = threading.Timer(END_S, _end_by_force)
    killer.daemon = True
    killer.start()
    try:
        ray.shutdown()
    finally:
        killer.cancel()


def _end_by_force() -> None:
    logger.error("Ray has not ended for %d s: its processes on this machine are killed", END_S)
    end_children()


@contextmanager
def _one_machine() -> Iterator[None]:
    """Within the block Ray takes this machine for one that can be in no cluster, as it does on macOS and Windows.

    By itself it puts the machine's own address in the place of 127.0.0.1 (`services.resolve_ip_for_localhost`), and
    listens on every interface unless a node's address is exactly that.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_answers(address: str, origin: str) -> None:
    """ConnectionError unless a Ray of this version answers at the address; `ray.init` would try for minutes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        said = f"nothing within {HEALTH_CHECK_SECONDS} s"
    else:
        if done.returncode == 0:
            return
        said = (done.stderr.strip() or done.stdout.strip() or "no answer").splitlines()[-1]
    raise ConnectionError(
        f"{origin}: expected a Ray cluster of version {ray.__version__} at {address}, got {said}. Start it, correct "
        "the address, or leave it out (unset RAY_ADDRESS) to start Ray on this machine alone"
    )
