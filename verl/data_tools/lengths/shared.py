"""What the tools that look at data have in common: how they end, what they write, and their flags' types.

Nothing here imports what takes long, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.console import printable, width

# Of wrong usage and of input that cannot be used.
BAD_INPUT = 2


def run_tool(run: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> None:
    """Print the report that `run` returns; exits with 2 and a sentence where its input is wrong."""
    try:
        print(printable(run(options)))
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(BAD_INPUT)


def require(package: str, name: str, why: str) -> None:
    """ValueError where a package of the extra `data` is not installed."""
    if find_spec(package) is None:
        raise ValueError(f"{why} needs {name}, which is not installed: pip install -e '.[data]'")


# ---------------------------------------------------------------------------------------------------------------------
# Files that are written


def check_output(flag: str, path: str | None, endings: Sequence[str], overwrite: bool) -> None:
    """ValueError for a file that cannot be written, before any work is done."""
    if path is None:
        return
    file = Path(path).expanduser()
    if file.suffix.lower() not in endings or file.is_dir():
        raise ValueError(f"{flag}: expected a file that ends in {' or '.join(endings)}, got {path}; rename it")
    if file.exists() and not overwrite:
        raise ValueError(f"{flag}: {path} is there already; pass --overwrite, or another name")


def write_whole(path: str, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place and moved there, so that it is whole whenever it has its name."""
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str, report: Mapping[str, Any]) -> None:
    """Readable, whatever the language; a number that is none becomes null."""
    text = json.dumps(_without_nan(report), indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Flags and tables


def tool_parser(name: str, required: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser without flags yet; `required`: those that a call has to have, for the usage line."""
    return argparse.ArgumentParser(
        prog=f"python -m verl.data_tools.{name}",
        usage=f"python -m verl.data_tools.{name} {required} [flags]",
        description=description,
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=118),
    )


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Where prompts and answers stand, and how they become tokens, named as in the trainer's `data` settings."""
    add = parser.add_argument
    add("--prompt_key", default="content", metavar="KEY", help="column of chat messages (default: content)")
    add(
        "--teacher_key",
        "--response_key",
        default="teacher_response",
        metavar="KEY",
        help="column of answers (default: teacher_response)",
    )
    add("--apply_chat_template_kwargs", type=json_object, default={}, metavar="JSON", help="as in data (default: {})")
    add("--special_token_text", choices=("text", "token"), default="text", help="as in data (default: text)")
    add("--on_bad_row", choices=("error", "skip"), default="error", help="as in data (default: error)")
    add("--trust_remote_code", action="store_true", help="run the model folder's own code")


def whole(lowest: int) -> Callable[[str], int]:
    """A whole number, `lowest` or more."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lowest}, got {text!r}")
        return int(text)

    return parse


def number_between(low: float, high: float) -> Callable[[str], float]:
    """A number above `low` and at most `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"expected a number above {low:g}, at most {high:g}, got {text!r}")
        return value

    return parse


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r}')
    return value


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns, the first `left` of them to the left and the others to the right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
        cells = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
