"""Is this run healthy?

`python -m verl.monitor RUN_DIR`: the first line is the verdict. Below it is every alarm, the first to be mended first,
with its causes and the settings to turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.monitor.figure import FILE, check_plotting, plot
from verl.monitor.reading import read_run
from verl.monitor.report.document import see
from verl.monitor.report.page import write_page
from verl.monitor.rules import load_rules
from verl.monitor.table import markdown
from verl.monitor.verdict import Words
from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import say
from verl.utils.refusals import tell

HEALTHY, ALARMS, USAGE = 0, 1, 2
EPILOG = """\
RUN is a folder with metrics.jsonl or TensorBoard's files, or a file: .jsonl, .json or .csv with a row per step, as W&B
exports them, trainer_state.json, or a console's .log or .txt with this trainer's lines or upstream verl's, which are
step:N - NAME:VALUE. Upstream's metric names and TRL's are known; metrics that are not there leave their rules silent.

example: %(prog)s checkpoints/gad/warmup checkpoints/gad/gad --html report.html

exit codes: 0 healthy now; 1 an alarm fires at the last step; 2 wrong usage, nothing to read, or no rule could judge
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    found = argparse.ArgumentParser(
        prog=called_as("verl.monitor"),
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=wide_formatter,
    )
    add = found.add_argument
    add("runs", nargs="*", metavar="RUN", help="a run's folder, or a file of metrics; several are compared")
    add("--rules", metavar="FILE", help="rules of your own, as trainer.monitor_rules takes them")
    add("--settings", metavar="FILE", help="the run's settings, YAML or JSON (default: settings.json in its folder)")
    add("--lang", choices=("en", "zh"), default="en", help="language of the report (default: en)")
    add("--plot", nargs="?", const="", metavar="FILE", help=f"draw it (default: {FILE} in the run's folder)")
    add("--html", metavar="FILE", help="write a report of all the runs, one page that needs no network")
    add("--verbose", action="store_true", help="name the rules that had no value, and why")
    add("--list", action="store_true", help="print the rules as a table, and nothing else")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        rules = load_rules(options.rules)
        if options.list:
            say(markdown(rules, options.lang))
            return HEALTHY
        if not options.runs:
            raise ValueError("expected a run's folder or a file of metrics, got nothing; see --help")
        if len(options.runs) > 1 and (options.plot is not None or options.settings is not None):
            raise ValueError(f"--plot and --settings: expected one run, got {len(options.runs)}; name one at a time")
        if options.plot is not None:
            check_plotting()
        seen = [see(path, read_run(path, options.settings), rules) for path in options.runs]
        for one in seen:
            if len(seen) > 1:
                say(f"== {one.run.name}")
            say(Words(one.watch, options.lang).report(one.run, options.verbose))
        if options.plot is not None:
            target = Path(options.plot).expanduser() if options.plot else seen[0].folder / FILE
            plot(seen[0].run, seen[0].watch, Words(seen[0].watch).verdict(seen[0].run), target)
            say(f"\n{target}")
        if options.html is not None:
            write_page(seen, Path(options.html).expanduser(), options.lang)
            say(f"\n{options.html}")
    except (OSError, ValueError) as error:
        tell(error)
        return USAGE
    if any(one.watch.firing for one in seen):
        return ALARMS
    return USAGE if all(one.watch.judged_nothing for one in seen) else HEALTHY


if __name__ == "__main__":
    sys.exit(main())
