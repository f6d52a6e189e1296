"""The command: flags in, report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl.data_tools.lengths.shared import (
    add_text_flags,
    check_output,
    number_between,
    require,
    run_tool,
    tool_parser,
    whole,
    write_json,
)

DESCRIPTION = "How two sets of prompts and answers (A and B) differ, and whether it is more than chance."
EPILOG = """\
example:
  python -m verl.data_tools.compare --a data/train.parquet --b data/test.parquet --model BASE --d_acc 0.768 0.458

The first line is the verdict, the largest difference first. The last part says what follows for a discriminator whose
accuracy falls from A to B. Same input, same seed: same output.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = tool_parser("compare", "--a FILE ... --b FILE ...", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--a", required=True, nargs="+", metavar="FILE", help="parquet or jsonl, such as the training data")
    add("--b", required=True, nargs="+", metavar="FILE", help="parquet or jsonl, such as the validation data")
    add("--names", nargs=2, metavar="NAME", help="what they are called (default: the files' names)")
    add("--model", metavar="FOLDER", help="count lengths in its tokens too")
    add("--student", metavar="FOLDER", help="compare this model's loss on the answers")
    add("--student_key", metavar="KEY", help="column of a student's answers: try out a discriminator on A, and on B")
    share = number_between(0, 1)
    add("--d_acc", nargs=2, type=share, metavar="X", help="a discriminator's accuracies on A and on B, to be read")
    add("--topics", type=whole(2), default=8, metavar="K", help="clusters of prompts (default: 8)")
    add("--max_rows", type=whole(20), default=5000, metavar="N", help="of each set, drawn at random (default: 5000)")
    add("--loss_rows", type=whole(20), default=100, metavar="N", help="of each set, for --student (default: 100)")
    add("--device", default="cpu", help="for --student: cpu, cuda or cuda:N (default: cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="for --student (default: float32)")
    add("--max_tokens", type=whole(1), default=8192, metavar="N", help="for --student, a forward (default: 8192)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of everything that is drawn (default: 0)")
    add("--json", metavar="FILE", help="write all numbers as .json too")
    add("--overwrite", action="store_true", help="replace files that are there")
    add_text_flags(parser)
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> str:
    """Compare and write; returns the report.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    check_output("--json", options.json, (".json",), options.overwrite)
    require("sklearn", "scikit-learn", "compare")
    from verl.data_tools.compare.comparison import compare
    from verl.data_tools.compare.report import render, to_json

    result = compare(options)
    report = render(result)
    if options.json:
        write_json(options.json, to_json(result, vars(options)))
        report += f"\n\nwrote {options.json}"
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_tool(run, parse(argv))
