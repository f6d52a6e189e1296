"""The command: flags in, report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl.data_tools.command_line import (
    Outcome,
    add_text_flags,
    add_training_flags,
    require,
    run_tool,
    tool_parser,
)
from verl.data_tools.writing import check_target, write_report
from verl.tools.flags import number_between, whole

DESCRIPTION = "How two sets of prompts and answers (A and B) differ, and whether it is more than chance."
EPILOG = """\
example:
  %(prog)s --a data/train.parquet --b data/test.parquet --model BASE --d_acc 0.768 0.458

The first line is the verdict, the largest difference first. The last part says what follows for a discriminator whose
accuracy falls from A to B. Same input, same seed: same output.
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tool_parser("compare", "--a FILE ... --b FILE ...", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--a", required=True, nargs="+", metavar="FILE", help="parquet or jsonl, such as the training data")
    add("--b", required=True, nargs="+", metavar="FILE", help="parquet or jsonl, such as the validation data")
    add("--names", nargs=2, metavar="NAME", help="what they are called (the files' names)")
    add("--model", metavar="FOLDER", help="count lengths in its tokens too")
    add("--student", metavar="FOLDER", help="compare this model's loss on the answers")
    add("--student_key", metavar="KEY", help="column of a student's answers: try out a discriminator on A, and on B")
    share = number_between(0, 1)
    add("--d_acc", nargs=2, type=share, metavar="X", help="a discriminator's accuracies on A and on B, to be read")
    add("--topics", type=whole(2), default=8, metavar="K", help="clusters of prompts (8)")
    add("--max_rows", type=whole(20), default=5000, metavar="N", help="of each set, drawn at random (5000)")
    add("--loss_rows", type=whole(20), default=100, metavar="N", help="of each set, for --student (100)")
    add("--device", default="cpu", help="for --student: cpu, cuda or cuda:N (cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="for --student (float32)")
    add("--max_tokens", type=whole(1), default=8192, metavar="N", help="for --student, a forward (8192)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of everything that is drawn (0)")
    add("--json", metavar="FILE", help="write all numbers as .json too")
    add("--overwrite", action="store_true", help="replace files that are there")
    add_text_flags(parser)
    add_training_flags(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    return build_parser().parse_args(argv)


def run(options: argparse.Namespace) -> Outcome:
    """Compare and write; returns how it ended.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    if options.json:
        target = check_target("--json", options.json, options.overwrite, [*options.a, *options.b], (".json",))
    require("sklearn", "scikit-learn", "compare")
    from verl.data_tools.compare.comparison import compare
    from verl.data_tools.compare.report import render, to_json

    result = compare(options)
    report = render(result)
    if options.json:
        write_report(target, to_json(result, vars(options)))
        report += f"\n\nwrote {options.json}"
    return Outcome(report)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_tool(run, parse(argv))
