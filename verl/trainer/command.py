"""The training command: its help at once, everything else by `main_ppo`."""

from __future__ import annotations

import sys

from verl.trainer.options import asked_for_help, build_parser

__all__ = ["build_parser", "main"]


def main() -> None:
    """The command line."""
    if not asked_for_help(sys.argv[1:]):
        # Not above: help is wanted at once, and this reads torch and Ray.
        from verl.trainer.main_ppo import main as train

        train()
