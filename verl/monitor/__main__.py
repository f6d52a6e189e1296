"""Is this run healthy? `python -m verl.monitor RUN_DIR`.

The first line is the verdict. Below it is every alarm, the first to be mended first, with its causes and the settings
to turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.monitor.figure import FILE, check_plotting, plot
from verl.monitor.reading import read_run
from verl.monitor.rules import load_rules
from verl.monitor.table import markdown
from verl.monitor.verdict import Words
from verl.monitor.watch import replay
from verl.utils.console import printable

HEALTHY, ALARMS, USAGE = 0, 1, 2
EPILOG = """\
RUN is a folder with metrics.jsonl or TensorBoard's files, or a file: .jsonl, .json or .csv with a row per step, as W&B
exports them, trainer_state.json, or a console's .log or .txt with verl's lines step:N - NAME:VALUE. Upstream verl's
metric names and TRL's are known; metrics that are not there leave their rules silent.

exit codes: 0 healthy now; 1 an alarm fires at the last step; 2 wrong usage, nothing to read, or no rule could judge
"""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m verl.monitor",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("run", nargs="?", metavar="RUN", help="a run's folder, or a file of metrics")
    add("--rules", metavar="FILE", help="rules of your own, as trainer.monitor_rules takes them")
    add("--settings", metavar="FILE", help="the run's settings, YAML or JSON (default: settings.json in its folder)")
    add("--lang", choices=("en", "zh"), default="en", help="language of the report (default: en)")
    add("--plot", nargs="?", const="", metavar="FILE", help=f"draw it (default: {FILE} in the run's folder)")
    add("--verbose", action="store_true", help="name the rules that had no value, and why")
    add("--list", action="store_true", help="print the rules as a table, and nothing else")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        rules = load_rules(options.rules)
        if options.list:
            print(printable(markdown(rules, options.lang)))
            return HEALTHY
        if options.run is None:
            raise ValueError("expected a run's folder or a file of metrics, got nothing; see --help")
        if options.plot is not None:
            check_plotting()
        run = read_run(options.run, options.settings)
        watch = replay(run, rules)
        print(printable(Words(watch, options.lang).report(run, options.verbose)))
        if options.plot is not None:
            path = Path(options.run).expanduser()
            target = (
                Path(options.plot).expanduser() if options.plot else (path if path.is_dir() else path.parent) / FILE
            )
            plot(run, watch, Words(watch).verdict(run), target)
            print(printable(f"\n{target}"))
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return USAGE
    if watch.firing:
        return ALARMS
    return USAGE if watch.judged_nothing else HEALTHY


if __name__ == "__main__":
    sys.exit(main())
