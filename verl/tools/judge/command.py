"""The command: flags in, report out."""

from __future__ import annotations

from collections.abc import Sequence

from verl.tools.command import run_command
from verl.tools.judge.options import build_parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = build_parser().parse_args(arguments)
    # Not above: help is wanted at once, and this reads torch.
    from verl.tools.judge.run import run

    run_command(run, options)
