"""What the commands of this folder have in common: flags, how a command ends, and its exit codes.

Nothing here imports what takes long, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import IO, NamedTuple

from verl.tools.flags import json_object
from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import say
from verl.utils.refusals import tell

# FOUND: what was looked for, or less than was asked for. USAGE: wrong flags, or input that cannot be used.
DONE, FOUND, USAGE = 0, 1, 2


class Outcome(NamedTuple):
    """A command's report and exit code."""

    report: str
    code: int = DONE


def run_tool(run: Callable[[argparse.Namespace], Outcome], options: argparse.Namespace) -> int:
    """Print the report of `run`, or the sentence that says what is wrong with its input; returns the exit code."""
    try:
        outcome = run(options)
    except (OSError, ValueError) as error:
        return fail(error)
    say(outcome.report)
    return outcome.code


def fail(error: Exception) -> int:
    """Say what is wrong with a command's input; returns the exit code."""
    tell(error)
    return USAGE


def require(package: str, name: str, why: str) -> None:
    """ValueError where a package of the extra `data` is not installed."""
    if find_spec(package) is None:
        raise ValueError(f"{why} needs {name}, which is not installed: pip install -e '.[data]'")


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: IO[str] | None = None) -> None:
        say(self.format_help().rstrip("\n"))


def tool_parser(name: str, required: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser without flags yet; `required`: those that a call has to have, for the usage line."""
    parser = _Parser(
        prog=called_as(f"verl.data_tools.{name}"),
        usage=f"%(prog)s {required} [flags]",
        description=f"{description} More: docs/data.md",
        epilog=epilog,
        formatter_class=wide_formatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Where prompts and answers stand, and how they become tokens, named as in the trainer's `data` settings."""
    add = parser.add_argument
    add("--prompt_key", default="content", metavar="KEY", help="column of chat messages (content)")
    add(
        "--teacher_key",
        "--response_key",
        default="teacher_response",
        metavar="KEY",
        help="column of answers (teacher_response)",
    )
    add("--apply_chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="as in data ({})")
    add("--trust_remote_code", action="store_true", help="run the model folder's own code")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What becomes of rows and texts that are not as usual, named likewise."""
    add = parser.add_argument
    add("--special_token_text", choices=("text", "token"), default="text", help="as in data (text)")
    add("--on_bad_row", choices=("error", "skip"), default="error", help="as in data (error)")
