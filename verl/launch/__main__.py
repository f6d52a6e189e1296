"""Starts a run on several machines: `--head` on one of them, `--worker ADDRESS` on the others.

    python -m verl.launch --head --nnodes 2 -- python -m verl.trainer.main_ppo ... trainer.nnodes=2
    python -m verl.launch --worker ADDRESS

The stage scripts' --head and --worker hand on to it. docs/nodes.md
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from verl.launch import cluster_token
from verl.launch.board import WrongToken
from verl.launch.head import LaunchFault, run_head
from verl.launch.orders import Orders
from verl.launch.worker import run_worker
from verl.tools.flags import number, whole
from verl.utils.console import printable
from verl.utils.run_log import log_to_terminal

FAILED = 1


def parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.launch", description="A run on several machines. More: docs/nodes.md"
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--head", action="store_true", help="this machine runs the trainer: the command behind --")
    place.add_argument("--worker", metavar="ADDRESS", help="this machine joins the head at HOST or HOST:PORT")
    parser.add_argument("--nnodes", type=whole(2), help="machines, the head included; for the head")
    parser.add_argument("--port", type=whole(1), default=6379, help="the head's (%(default)s)")
    parser.add_argument("--node_ip", help="this machine's address, where it has several")
    parser.add_argument("--wait", type=number(1), default=600, help="seconds to wait for the others (%(default)s)")
    parser.add_argument(
        "--token_file", type=Path, default=Path(cluster_token.FILE),
        help="the cluster's token, on storage that all nodes see; the head makes it (%(default)s). RAY_AUTH_TOKEN goes "
        "before it",
    )  # fmt: skip
    parser.add_argument(
        "--ray", action="append", default=[], metavar="FLAG", help="for `ray start`: --ray=--num-cpus=8"
    )
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="what the head runs once all nodes are there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: the command's, on every node, or 1 where the nodes did not come together."""
    known = parser()
    options = known.parse_args(arguments)
    if options.head and (options.nnodes is None or not options.command):
        known.error("--head needs --nnodes N and, behind --, the command to run")
    if options.worker and options.command:
        known.error("a worker runs no command: it is the head's")
    log_to_terminal()
    # Another cluster's.
    os.environ.pop("RAY_ADDRESS", None)
    logger, orders, made = logging.getLogger("verl.launch"), Orders(), None
    with orders.noted():
        try:
            made = cluster_token.take(options.token_file, 0 if options.head else options.wait, orders.stop_if_any)
            return run_head(options, orders) if options.head else run_worker(options, orders)
        except (LaunchFault, cluster_token.TokenFault, WrongToken) as fault:
            logger.error("%s", printable(str(fault)))
            return FAILED
        except KeyboardInterrupt as told:
            return 128 + told.args[0]
        finally:
            cluster_token.remove(made)


if __name__ == "__main__":
    sys.exit(main())
