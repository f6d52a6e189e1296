"""A worker: it joins the head's cluster and ends with the run, with the run's exit code."""

from __future__ import annotations

import argparse
import logging
import platform
import signal
import time

from verl.launch.board import UNANSWERED, Board, listens
from verl.launch.head import LOOK_S, SAY_S, LaunchFault
from verl.launch.orders import Orders
from verl.launch.ray_node import RayNode

logger = logging.getLogger(__name__)

# A head that does not answer for so long is gone. Ray's client ends this process after a minute of it.
LOST_S = 30.0


def run_worker(options: argparse.Namespace, orders: Orders) -> int:
    """Returns the run's exit code; LaunchFault where the head is not found or lost."""
    address = options.worker if ":" in options.worker else f"{options.worker}:{options.port}"
    _wait_for_head(address, options.wait, orders)
    board = Board(address)
    node = RayNode(
        [f"--address={address}", *([f"--node-ip-address={options.node_ip}"] if options.node_ip else []), *options.ray]
    )
    logger.info("this node joins the head at %s, and ends with its run", address)
    try:
        code = _until_the_end(board, address, node, orders)
    finally:
        node.end()
    logger.info("the run is over (exit code %d), and so is this node", code)
    return code


def _wait_for_head(address: str, seconds: float, orders: Orders) -> None:
    deadline, said = time.monotonic() + seconds, time.monotonic()
    while not listens(address):
        orders.stop_if_any()
        now = time.monotonic()
        if now > deadline:
            raise LaunchFault(
                f"nobody listens at {address}, where the head should be, after {seconds:g} s (--wait): start it there "
                "(--head), or correct the address or port; a firewall may be between"
            )
        if now - said > SAY_S:
            logger.info("waiting for the head at %s, %.0f s are left", address, deadline - now)
            said = now
        time.sleep(LOOK_S)


def _until_the_end(board: Board, address: str, node: RayNode, orders: Orders) -> int:
    """The run's exit code, or that of a second signal. A first one is told to the run, which saves."""
    answered, told = time.monotonic(), False
    while True:
        number = orders.take()
        if number is not None and told:
            return 128 + number
        try:
            if number is not None:
                logger.info("%s: the run is told; a second signal ends this node at once", signal.Signals(number).name)
                board.say_signal(number, f"node {platform.node()}")
                told = True
            if listens(address):
                code = board.end()
                if code is not None:
                    board.say_gone()
                    return code
                answered = time.monotonic()
        except UNANSWERED as error:
            logger.warning("the head at %s has not answered: %s", address, error)
        words = node.ended()
        if words is not None:
            raise LaunchFault(words)
        if time.monotonic() - answered > LOST_S:
            raise LaunchFault(f"the head at {address} has not answered for {LOST_S:g} s: this node ends")
        time.sleep(LOOK_S)
