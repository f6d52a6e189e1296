"""What the commands' help has in common."""

from __future__ import annotations

import argparse
import sys

WIDTH = 119


def called_as(module: str) -> str:
    """What usage lines and examples begin with: `python -m MODULE`, or `verl NAME`.

    The latter stands in the place of the program's name where `verl.cli` has been called.
    """
    own = sys.argv[0]
    return own if own.startswith("verl ") else f"python -m {module}"


def wide_formatter(prog: str) -> argparse.HelpFormatter:
    """A line for a flag, at any terminal's width; texts as they stand."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=WIDTH)
