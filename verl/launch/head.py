"""The head: it starts the cluster, waits for all nodes, runs the command and ends all nodes with it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import time

from ray._private import services

from verl.launch.board import UNANSWERED, Board, Member, listens
from verl.launch.orders import Orders
from verl.launch.ray_node import RayNode
from verl.utils.signals import EndedBySignal

logger = logging.getLogger(__name__)

# Below the second within which the trainer takes the same signal for one.
LOOK_S = 0.2
SAY_S = 10.0
# Within this time after a worker's signal, the head's own is the same order.
SAME_ORDER_S = 10.0
# For the workers to read that the run is over.
GONE_S = 15.0


class LaunchFault(RuntimeError):
    """What keeps the nodes from coming together, or takes one away."""


def run_head(options: argparse.Namespace, orders: Orders) -> int:
    """Returns the command's exit code; LaunchFault where it was not begun."""
    address = f"{options.node_ip or services.get_node_ip_address()}:{options.port}"
    if listens(address):
        raise LaunchFault(
            f"port {options.port} of this machine is taken, perhaps by the head of another run: end that, or choose "
            "another --port here and for the workers"
        )
    logger.info("starting the head of %d nodes; on each of the others: --worker %s", options.nnodes, address)
    node = RayNode(["--head", f"--port={options.port}", "--include-dashboard=false", "--disable-usage-stats",
                    f"--node-ip-address={address.rpartition(':')[0]}", *options.ray])  # fmt: skip
    board, code = None, 1
    try:
        board = _first_look(node, address, options.wait, orders)
        members = _all_there(node, board, options.nnodes, options.wait, orders)
        logger.info("all %d nodes are there: %s", len(members), ", ".join(map(str, members)))
        code = _run(options.command, address, node, board, orders)
    except EndedBySignal as end:
        code = end.exit_code
    finally:
        _end_workers(board, code)
        node.end()
    return code


def _first_look(node: RayNode, address: str, seconds: float, orders: Orders) -> Board:
    deadline = time.monotonic() + seconds
    while not listens(address):
        _still_works(node)
        orders.stop_if_any()
        if time.monotonic() > deadline:
            raise LaunchFault(f"Ray's head has not begun to listen at {address} for {seconds:g} s")
        time.sleep(LOOK_S)
    return Board(address)


def _all_there(node: RayNode, board: Board, count: int, seconds: float, orders: Orders) -> list[Member]:
    """The nodes, once there are enough; which ones are there is said as they come."""
    deadline, said, known = time.monotonic() + seconds, 0.0, -1
    while True:
        _still_works(node)
        orders.stop_if_any()
        members = board.members()
        if len(members) >= count:
            return members
        now = time.monotonic()
        names = ", ".join(map(str, members)) or "none yet"
        if now > deadline:
            raise LaunchFault(
                f"there are {len(members)} nodes of the {count} after {seconds:g} s (--wait): {names}. Look at what "
                "the workers print, whether they reach this machine's port, and at --nnodes"
            )
        if len(members) != known or now - said > SAY_S:
            logger.info("%d of %d nodes: %s; waiting, %.0f s are left", len(members), count, names, deadline - now)
            said, known = now, len(members)
        time.sleep(LOOK_S)


def _run(command: list[str], address: str, node: RayNode, board: Board, orders: Orders) -> int:
    """The exit code of the command, which is told the signals that this node gets, or the first one of a worker's.

    Who ends a job signals all of its nodes, and means it once: a second signal would cost the run its checkpoint.
    """
    # In a session of its own: a signal to the group, as Ctrl-C is, comes once, from here.
    process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, start_new_session=True)
    told, when = None, 0.0
    while (code := process.poll()) is None:
        number = orders.take()
        if number is not None and not (number == told and time.monotonic() - when < SAME_ORDER_S):
            told, when = number, 0.0
            process.send_signal(number)
        elif told is None and node.ended() is None and (of_worker := _from_a_worker(board)) is not None:
            told, when = of_worker, time.monotonic()
            process.send_signal(of_worker)
        time.sleep(LOOK_S)
    return code if code >= 0 else 128 - code


def _from_a_worker(board: Board) -> int | None:
    try:
        told = board.signal()
    except UNANSWERED as error:
        logger.warning("the head has not answered: %s", error)
        return None
    if told is None:
        return None
    logger.info("%s got %s: the run is told", told[1], signal.Signals(told[0]).name)
    return told[0]


def _end_workers(board: Board | None, code: int) -> None:
    if board is None:
        return
    try:
        others = len(board.members()) - 1
        board.say_end(code)
        board.wait_until_gone(others, GONE_S)
    except UNANSWERED as error:
        logger.warning("the workers could not be told that the run is over (%s): they end by themselves", error)


def _still_works(node: RayNode) -> None:
    words = node.ended()
    if words is not None:
        raise LaunchFault(words)
