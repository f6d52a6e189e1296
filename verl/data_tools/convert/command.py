"""The command: flags in, report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl.data_tools.command_line import Outcome, run_tool, tool_parser

DESCRIPTION = "Converts data of any of the usual formats into a dataset that trains, and says what it made of it."
EPILOG = """\
IN is a file (.json, .jsonl, .csv, .tsv, .xlsx, .parquet; text also .gz), a folder of such files, one of Hugging
Face's save_to_disk, or a dataset's name on the hub. The format is recognised by columns and content: sharegpt,
messages (OpenAI), alpaca, prompt_response (also question+answer and the like), preference (its chosen answers), verl.

examples:
  %(prog)s sharegpt.json --out train.parquet
  %(prog)s faq.xlsx --prompt_column Frage --answer_column Antwort --out train.parquet

exit codes: 0 written; 2 wrong usage, or nothing that can be converted
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tool_parser("convert", "IN [IN ...] --out FILE", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help=argparse.SUPPRESS)
    add("--out", required=True, metavar="FILE", help=".parquet or .jsonl to write")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--left_out", metavar="FILE", help="write what is left out, with its reasons (.jsonl)")
    add("--on_bad_row", choices=("skip", "error"), default="skip", help="leave out and count, or stop (skip)")
    add("--turns", choices=("all", "last"), default="all", help="of a conversation, a row per answer, or one (all)")
    add("--drop_columns", action="store_true", help="leave out columns that are not used (carry them along)")
    add("--tools", choices=("leave_out", "text"), default="leave_out", help="turns with tools (leave_out)")
    add("--reasoning", choices=("drop", "think"), default="drop", help="reasoning: not kept, or <think> (drop)")
    for name, what in (("prompt", "prompts or conversations"), ("answer", "answers"), ("system", "system messages")):
        add(f"--{name}_column", metavar="NAME", help=f"column of {what} (NAME.NAME: a field within)")
    add("--format", metavar="FORMAT", help="one of those below, where several fit")
    add("--encoding", metavar="NAME", help="of text, e.g. gb18030 (UTF-8, or what the file's mark says)")
    add("--delimiter", metavar="CHAR", help="of CSV (found)")
    add("--sheet", metavar="NAME", help="of Excel files with several")
    add("--split", metavar="NAME", help="of datasets (train)")
    add("--subset", metavar="NAME", help="of datasets on the hub, their configuration")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is read."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.delimiter is not None:
        options.delimiter = {"\\t": "\t", "tab": "\t"}.get(options.delimiter, options.delimiter)
        if len(options.delimiter) != 1 or options.delimiter in '"\r\n':
            parser.error(f"--delimiter: expected one character (or tab), got {options.delimiter!r}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(argv)
    # Not above: help is wanted at once, and this reads transformers.
    from verl.data_tools.convert.run import run

    return run_tool(lambda options: Outcome(run(options)), options)
