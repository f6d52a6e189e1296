"""Looks through data for what would spoil training on it: bad rows, repeats, leaks, cut answers, secrets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

DONE, FOUND, USAGE = 0, 1, 2
EPILOG = """\
kinds: bad, empty, overlap, near_overlap (with --against), duplicate, near_duplicate, secret, refused, cut, no_end,
template, special_text (with --model), language, long, short; docs/data.md says what each is

  python -m verl.data_tools.check train.parquet --against test.parquet --model MODEL --out flagged.jsonl
  python -m verl.data_tools.check train.parquet --fail_on bad,secret,duplicate --json report.json

exit codes: 0 nothing of --fail_on was found; 1 something was; 2 wrong usage, or a file that cannot be read
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.data_tools.check",
        description=__doc__,
        epilog=EPILOG,
        usage="%(prog)s FILE [FILE ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=argparse.SUPPRESS)
    add("--against", nargs="+", default=[], metavar="FILE", help="test data, which the prompts are not to be in")
    add("--model", metavar="PATH", help="the student: check as its tokenizer and chat template read the rows")
    add("--fail_on", metavar="KINDS", help="exit with 1 for these, any or none (bad,empty,overlap)")
    add("--near", type=_similarity, default=0.8, metavar="SHARE", help="how much prompts share to be alike (0.8)")
    add("--out", metavar="FILE", help="write the rows in which something was found (.jsonl or .parquet)")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints it in the report's place")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--examples", type=_whole, default=2, metavar="N", help="examples of each kind (2)")
    add("--prompt_key", default="content", metavar="KEY", help="as in the trainer's data settings (content)")
    add("--teacher_key", default="teacher_response", metavar="KEY", help="of the answers (teacher_response)")
    add("--apply_chat_template_kwargs", type=_json_object, default={}, metavar="JSON", help="as in data ({})")
    add("--trust_remote_code", action="store_true", help="run the model's own code")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, each by itself."""
    return build_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    # Not above: help is wanted at once, and these read transformers.
    from verl.data_tools.check.run import run
    from verl.utils.console import printable

    try:
        report, failed = run(options)
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return USAGE
    print(printable(report))
    return FOUND if failed else DONE


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags


def _similarity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.3 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0.3 to 1, got {text!r}")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r}')
    return value
