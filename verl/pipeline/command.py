"""The command: looks at everything, then stage after stage, then what is made of them."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from verl.pipeline.options import parse_options
from verl.utils.console import printable, say
from verl.utils.refusals import tell
from verl.utils.signals import EndedBySignal

if TYPE_CHECKING:
    from verl.pipeline.whole import Pipeline

USAGE = 2


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    options = parse_options(argv)
    print("loading libraries ...", file=sys.stderr, flush=True)
    # What takes seconds to import, after flags that are wrong have been refused.
    from verl.models.loading import quiet_transformers
    from verl.pipeline.whole import Pipeline
    from verl.utils.run_log import log_to_terminal

    log_to_terminal()
    quiet_transformers()
    try:
        return _run(Pipeline(options), options)
    except EndedBySignal as end:
        print(printable(f"{end}: the same line goes on from here"), file=sys.stderr)
        return end.exit_code
    except (OSError, ValueError) as error:
        tell(error)
        return USAGE


def _run(pipeline: Pipeline, options: Namespace) -> int:
    if options.dry_run:
        return pipeline.dry_run()
    with pipeline.processes.signals_taken():
        code = pipeline.run()
    if code == 0:
        return 0
    say(f"ended with exit code {code}; the same line goes on from here")
    return code
