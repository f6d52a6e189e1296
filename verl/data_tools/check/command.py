"""The command: flags in, report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl.data_tools.command_line import add_text_flags, run_tool, tool_parser
from verl.tools.flags import share, whole

DESCRIPTION = "Looks for what would spoil training on data: bad rows, repeats, leaks, cut answers, secrets."
EPILOG = """\
kinds: bad, empty, overlap, near_overlap (with --against), duplicate, near_duplicate, secret, refused, cut, no_end,
template, special_text (with --model), language, long, short; docs/data.md says what each is

examples:
  %(prog)s train.parquet --against test.parquet --model MODEL --out flagged.jsonl
  %(prog)s train.parquet --fail_on bad,secret,duplicate --json report.json

exit codes: 0 nothing of --fail_on was found; 1 something was; 2 wrong usage, or a file that cannot be read
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tool_parser("check", "FILE [FILE ...]", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=argparse.SUPPRESS)
    add("--against", nargs="+", default=[], metavar="FILE", help="test data, which the prompts are not to be in")
    add("--model", metavar="PATH", help="the student: check as its tokenizer and chat template read the rows")
    add("--fail_on", metavar="KINDS", help="exit with 1 for these, any or none (bad,empty,overlap)")
    add(
        "--near",
        type=share(0.3),
        default=0.8,
        metavar="SHARE",
        help="how much prompts share to be alike (0.8)",
    )
    add("--out", metavar="FILE", help="write the rows in which something was found (.jsonl or .parquet)")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints it in the report's place")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--examples", type=whole(0), default=2, metavar="N", help="examples of each kind (2)")
    add_text_flags(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, each by itself."""
    return build_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    # Not above: help is wanted at once, and this reads transformers.
    from verl.data_tools.check.run import run

    return run_tool(run, options)
