"""What the commands of this folder have in common: flags (their types are in `flags.py`), and how a command ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import get_args

import torch

from verl.models.loading import quiet_transformers
from verl.tools.flags import json_object, whole
from verl.utils.console import say
from verl.utils.dataset.texts import SpecialText
from verl.utils.refusals import text_of
from verl.utils.torch_functional import Truncation


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], str], arguments: Sequence[str] | None
) -> None:
    """Print the report that `run` returns; exits with a sentence where something is wrong with what it was given."""
    options = parser.parse_args(arguments)
    quiet_transformers()
    try:
        report = run(options)
    except (OSError, ValueError) as error:
        sys.exit(text_of(error))
    say(report)


def command_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser without flags yet; of the description, the first line."""
    return argparse.ArgumentParser(
        prog=f"python -m verl.tools.{name}",
        description=description.splitlines()[0],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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
        choices=get_args(Truncation),
        default="error",
        help="what becomes of longer prompts: refused, or cut on that side (default: error)",
    )
    add("--apply_chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="as in data (default: {})")
    add(
        "--special_token_text",
        choices=get_args(SpecialText),
        default="text",
        help="what a special token's name in a text is: its letters, or the token; as in data (default: text)",
    )


def check_device(device: str) -> None:
    """ValueError for a device that there is not."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or device == kind):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {device}; pass one of these")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {device}; pass cpu")
