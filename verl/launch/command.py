"""The command: flags in, the run's exit code out. Nothing here imports Ray, so that `--help` is quick."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from verl.launch import cluster_token
from verl.tools.flags import number, whole
from verl.utils.command_line import called_as, wide_formatter

EPILOG = """\
The stage scripts' --head and --worker hand on to this command. More: docs/nodes.md

examples:
  %(prog)s --head --nnodes 2 -- verl train stage=seqkd ... trainer.nnodes=2
  %(prog)s --worker ADDRESS
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog=called_as("verl.launch"),
        usage="%(prog)s --head --nnodes N [flags] -- COMMAND\n       %(prog)s --worker ADDRESS [flags]",
        description="A run on several machines: --head on one of them, --worker ADDRESS on the others.",
        epilog=EPILOG,
        formatter_class=wide_formatter,
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--head", action="store_true", help="this machine runs the trainer: the command behind --")
    place.add_argument("--worker", metavar="ADDRESS", help="this machine joins the head at HOST or HOST:PORT")
    add = parser.add_argument
    add("--nnodes", type=whole(2), metavar="N", help="machines, the head included; for the head")
    add("--port", type=whole(1), default=6379, metavar="PORT", help="the head's (default: 6379)")
    add("--node_ip", metavar="IP", help="this machine's address, where it has several")
    add("--wait", type=number(1), default=600, metavar="S", help="seconds to wait for the others (default: 600)")
    add(
        "--token_file",
        type=Path,
        default=Path(cluster_token.FILE),
        metavar="FILE",
        help=f"the cluster's token, where all nodes see it; RAY_AUTH_TOKEN goes first (default: {cluster_token.FILE})",
    )
    add("--ray", action="append", default=[], metavar="FLAG", help="for `ray start`: --ray=--num-cpus=8")
    add("command", nargs="*", metavar="COMMAND", help="behind --: what the head runs once all nodes are there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: the run's, on every node, or 1 where the nodes did not come together."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.head and (options.nnodes is None or not options.command):
        parser.error("--head needs --nnodes N and, behind --, the command to run")
    if options.head and shutil.which(options.command[0]) is None:
        parser.error(f"there is no program {options.command[0]} to run")
    if options.worker and options.command:
        parser.error("a worker runs no command: it is the head's")
    # Not above: help is wanted at once, and this reads Ray.
    from verl.launch.run import run

    return run(options)
