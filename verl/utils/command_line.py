"""What the commands' help has in common, and how commands are named in whatever is said to a user."""

from __future__ import annotations

import argparse
import os
import sys

WIDTH = 119
# Between a command and those that it starts; not for users.
CONSOLE, WHAT_NEXT = "VERL_BY_CONSOLE", "VERL_WHAT_NEXT"
# What `python -m` runs, and the subcommand of `verl` that is the same; `verl/cli/commands.py` says where each is.
SUBCOMMANDS = {
    "verl.pipeline": "distill",
    "verl.trainer.main_ppo": "train",
    "verl.launch": "launch",
    "verl.model_merger": "merge",
    "verl.tools.chat": "chat",
    "verl.monitor": "monitor",
    "verl.tools.judge": "judge",
    "verl.tools.score": "score",
    "verl.data_tools.collect": "data collect",
    "verl.data_tools.convert": "data convert",
    "verl.data_tools.check": "data check",
    "verl.data_tools.split": "data split",
    "verl.data_tools.lengths": "data lengths",
    "verl.data_tools.compare": "data compare",
    "verl.cli completion": "completion",
}


def by_console() -> bool:
    """Whether the user has called `verl`, which then stands in the place of the program's name; or whoever started this
    process was called so (`for_children`)."""
    return sys.argv[0].startswith("verl ") or os.environ.get(CONSOLE) == "1"


def for_children() -> dict[str, str]:
    """What to put into the environment of a command that this one starts, so that it names commands as the user does
    and, its caller doing what comes next, offers none (`goes_on_by_itself`)."""
    return {WHAT_NEXT: "off"} | ({CONSOLE: "1"} if by_console() else {})


def goes_on_by_itself() -> bool:
    """Whether who started this process does what comes after it (`for_children`)."""
    return os.environ.get(WHAT_NEXT) == "off"


def called_as(module: str) -> str:
    """What a command begins with, in help and wherever one is offered: `verl NAME` to those who have called `verl`, and
    to others `python -m MODULE`, which needs no install."""
    return f"verl {SUBCOMMANDS[module]}" if by_console() else f"python -m {module}"


def wide_formatter(prog: str) -> argparse.HelpFormatter:
    """A line for a flag, at any terminal's width; texts as they stand."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=WIDTH)
