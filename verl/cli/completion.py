"""`verl completion SHELL`: a script that completes commands and flags, made by shtab of the commands' own parsers.

The script is complete in itself: no Python starts when a key is pressed.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module

import shtab

from verl.cli import commands
from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import say

SHELLS = ("bash", "zsh", "tcsh")
EPILOG = """\
examples:
  eval "$(%(prog)s bash)"                                  in ~/.bashrc, or once in this shell
  %(prog)s zsh > ~/.zfunc/_verl                            with ~/.zfunc in zsh's fpath
"""
# Words in the names that flags give to paths.
_FOLDERS, _FILES = {"DIR", "FOLDER"}, {"FILE", "PATH", "RUN", "IN", "PROMPTS", "BASE", "TRAIN", "VAL"}


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog=called_as("verl.cli completion"),
        description="Prints what your shell completes commands and flags of verl with.",
        epilog=EPILOG,
        formatter_class=wide_formatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    return parser


def main() -> None:
    """Run the command."""
    shell = build_parser().parse_args().shell
    say(shtab.complete(whole_parser(), shell))


def whole_parser() -> argparse.ArgumentParser:
    """The parser of `verl` with those of all subcommands."""
    parser = argparse.ArgumentParser(prog="verl")
    parser.add_argument("--version", action="store_true", help="print the version")
    _add(parser, commands.VERL)
    return parser


def _add(parser: argparse.ArgumentParser, group: commands.Group) -> None:
    added = parser.add_subparsers()
    for name, found in group.commands.items():
        if isinstance(found, commands.Group):
            _add(added.add_parser(name, help=found.summary), found)
        else:
            own = _parsers(found)
            part = added.add_parser(name, help=found.summary, parents=own, add_help=not own, conflict_handler="resolve")
            _complete_paths(part)


def _parsers(command: commands.Command) -> list[argparse.ArgumentParser]:
    """A subcommand's parser, or those of its own subcommands, which may be left out."""
    if not command.is_there():
        return []
    parser = import_module(command.parser or command.module).build_parser()
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [each for action in inner for each in action.choices.values()] or [parser]


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Have shtab complete paths where a flag takes one."""
    for action in parser._actions:
        words = set(re.findall("[A-Z]+", action.metavar)) if isinstance(action.metavar, str) else set()
        if words & _FILES:
            action.complete = shtab.FILE
        elif words & _FOLDERS:
            action.complete = shtab.DIRECTORY
