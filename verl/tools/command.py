"""What the commands of this folder have in common: flags (their types are in `flags.py`), and how a command ends.

Nothing here imports what takes long, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from typing import IO, Any, get_args, get_type_hints

from verl.config.run import DataConfig
from verl.tools.flags import json_object, whole
from verl.utils.command_line import WIDTH, called_as, wide_formatter
from verl.utils.console import say
from verl.utils.refusals import text_of


def run_command(run: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> None:
    """Print the report that `run` returns; exits with a sentence where something is wrong with what it was given."""
    from verl.models.loading import quiet_transformers

    quiet_transformers()
    try:
        report = run(options)
    except (OSError, ValueError) as error:
        sys.exit(text_of(error))
    say(report)


# ---------------------------------------------------------------------------------------------------------------------
# Help


class CommandParser(argparse.ArgumentParser):
    """A parser with two kinds of help: `--help` fits on a screen, and `--help_all` has everything.

    The first has an example, and of `special_group`s the flags' names alone; the second has a line for every flag, and
    `more` below them.
    """

    def __init__(self, example: str, more: str, **options: Any):
        super().__init__(**options, formatter_class=wide_formatter, add_help=False)
        self._example, self._more = example, more
        self._special: list[argparse._ArgumentGroup] = []
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.add_argument("--help_all", action=_HelpAll, help="explain every flag")

    def special_group(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """A group of flags that are seldom needed."""
        group = self.add_argument_group(title, description)
        self._special.append(group)
        return group

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            if everything or group not in self._special:
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
            else:
                names = " ".join(name for action in group._group_actions for name in action.option_strings)
                formatter.add_text(textwrap.fill(names, WIDTH - 4, break_on_hyphens=False))
            formatter.end_section()
        formatter.add_text(self._example)
        if everything:
            formatter.add_text(self._more)
        return formatter.format_help()

    def print_help(self, file: IO[str] | None = None, everything: bool = False) -> None:
        say(self.format_help(everything).rstrip("\n"))


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str | None = None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: CommandParser, *_: Any) -> None:
        parser.print_help(everything=True)
        parser.exit()


def command_parser(name: str, required: str, description: str, example: str, more: str) -> CommandParser:
    """A parser without flags yet; `required`: those that a call has to have, for the usage line."""
    return CommandParser(
        example,
        more,
        prog=called_as(f"verl.tools.{name}"),
        usage=f"%(prog)s {required} [flags]",
        description=description,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def choices_of(settings: type, name: str) -> tuple[str, ...]:
    """The values that a setting of the trainer may have, but for null."""
    hint = get_type_hints(settings)[name]
    choices = get_args(hint)
    return choices if type(None) not in choices else get_args(choices[0])


def add_column_flags(group: argparse._ArgumentGroup) -> None:
    """Where prompts and the teacher's answers are, named as in the trainer's `data` settings."""
    add = group.add_argument
    add("--prompt_key", default="content", metavar="KEY", help="chat messages, or one user's text (default: content)")
    add("--teacher_key", default="teacher_response", metavar="KEY", help="teacher's text (default: teacher_response)")


def add_token_flags(group: argparse._ArgumentGroup) -> None:
    """How texts become tokens, named as in the trainer's `data` settings."""
    add = group.add_argument
    add("--max_prompt_length", type=whole(1), metavar="N", help="tokens of a prompt (default: no limit)")
    add(
        "--truncation",
        choices=choices_of(DataConfig, "truncation"),
        default="error",
        help="what becomes of longer prompts: refused, or cut on that side (default: error)",
    )
    add_template_flag(group)
    add(
        "--special_token_text",
        choices=choices_of(DataConfig, "special_token_text"),
        default="text",
        help="what a special token's name in a text is: its letters, or the token; as in data (default: text)",
    )


def add_template_flag(group: argparse._ArgumentGroup) -> None:
    """What the chat template is given besides the messages."""
    group.add_argument(
        "--apply_chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="as in data (default: {})"
    )


def check_device(device: str) -> None:
    """ValueError for a device that there is not."""
    import torch

    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or device == kind):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device}; pass one of these")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {device}; pass cpu")
