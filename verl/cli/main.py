"""The console command: finds the subcommand and runs it in this process, as `python -m` would.

Only the subcommand's own module is imported, so its help is as quick alone. It reads `sys.argv`, ends as it ends alone
(exit code, Ctrl-C, traceback), and names itself as the user called it. Until it is known whether these files are all
of one package, nothing is imported but `verl.cli`.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from verl.cli.commands import VERL, Command, Group
from verl.cli.other_verl import warn_of_another_verl

USAGE = 2
HELP = ("-h", "--help")


def main() -> int | str | None:
    """The command line; returns what to exit with."""
    warn_of_another_verl()
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        from verl import __version__
        from verl.utils.console import say

        say(f"verl {__version__}")
        return 0
    return dispatch(VERL, "verl", arguments)


def dispatch(group: Group, called: str, arguments: list[str]) -> int | str | None:
    """Run the subcommand that the arguments begin with; returns what to exit with."""
    if not arguments or arguments[0] in HELP:
        from verl.utils.console import say

        say(listing(group, called))
        return 0 if arguments else USAGE
    name, *rest = arguments
    found = group.commands.get(name)
    if found is None:
        print(f"{called}: error: {unknown(group, called, name)}", file=sys.stderr)
        return USAGE
    if isinstance(found, Group):
        return dispatch(found, f"{called} {name}", rest)
    return run(found, f"{called} {name}", rest)


def run(command: Command, called: str, arguments: list[str]) -> int | str | None:
    """Run a subcommand's `main` in the place of the program."""
    if not command.is_there():
        print(f"{called}: error: this installation has no module {command.module}; install verl anew", file=sys.stderr)
        return USAGE
    sys.argv = [called, *arguments]
    return import_module(command.module).main()


def listing(group: Group, called: str) -> str:
    """The help of a group: a line for each subcommand."""
    width = max(map(len, group.commands))
    lines = [f"usage: {called} COMMAND ...", "", group.summary, "", "commands:"]
    lines += [f"  {name:{width}}  {command.summary}" for name, command in group.commands.items()]
    if group is VERL:
        lines += ["", "options:", "  --help, --version"]
    lines += ["", f"example: {group.example}", f"{called} COMMAND --help says more about each."]
    return "\n".join(lines)


def unknown(group: Group, called: str, name: str) -> str:
    """The sentence for a subcommand that there is not, with the nearest one, which may be in a group."""
    within = {inner: f"{called} {outer} {inner}" for outer, found in group.commands.items()
              if isinstance(found, Group) for inner in found.commands}  # fmt: skip
    full = within | {known: f"{called} {known}" for known in group.commands}
    near = difflib.get_close_matches(name.lower(), full, n=1, cutoff=0.5)
    what = "option" if name.startswith("-") else "command"
    if near:
        return f"there is no {what} {name!r}; did you mean `{full[near[0]]}`?"
    return f"there is no {what} {name!r}: expected one of {', '.join(group.commands)}"
