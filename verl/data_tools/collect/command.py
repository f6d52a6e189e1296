"""The teacher's answers to prompts, through an OpenAI-compatible endpoint: the command.

`prompts.py` reads, `cost.py` estimates and counts, `asking.py` asks, `log.py` keeps, `answers.py` judges, `output.py`
writes, and `run.py` has them in order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from verl.data_tools.collect.options import build_parser
from verl.data_tools.command_line import fail
from verl.utils.signals import EndedBySignal, RunSignals


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's settings."""
    return build_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 all there, or a limit reached; 1 some got no answer; 2 a user's error."""
    options = parse(argv)
    # It takes seconds to import, which --help does not wait for.
    from verl.data_tools.collect.run import run

    signals = RunSignals()
    try:
        with signals.taken():
            return run(options, signals)
    except EndedBySignal as error:
        print(f"ended by {error.number.name}; to go on, run the same command again", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError) as error:
        return fail(error)
