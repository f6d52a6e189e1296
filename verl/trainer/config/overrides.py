"""Command-line arguments as people type them, rewritten as Hydra reads them.

Hydra has a language of its own for values, which knows neither Chinese nor most signs outside of quotation marks, and
takes `a,b` for two runs. What that language does not take as one value is text here, and so is every value of a key
that holds text: `trainer.experiment_name=1e5` is a name.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from verl.config.run import Config
from verl.trainer.config.errors import ConfigError

CONFIG_DIR = Path(__file__).parent
GROUPS = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}

# Names from older scripts and notes, and the key that has the effect.
ALIASES = {
    "optim.warmup_style": "optim.lr_scheduler_type",
    "optim.lr_scheduler.type": "optim.lr_scheduler_type",
    "optim.lr_scheduler.warmup_steps": "optim.lr_warmup_steps",
    "optim.lr_scheduler.total_steps": "optim.total_training_steps",
}
# Hydra's flags, and those with a value behind them.
FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
         "--shell-completion", "-sc")  # fmt: skip
VALUED_FLAGS = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
                "--experimental-rerun")  # fmt: skip
OPTIONALLY_VALUED_FLAGS = ("--info", "-i")
# And not a number, which may be a value behind a space.
FLAG = re.compile("--?[A-Za-z]")
FULL_WIDTH_EQUALS = "\uff1d"
ARGUMENT = re.compile(r"\+{0,2}(?P<key>[^=+~-][^=]*)=(?P<value>.*)", flags=re.DOTALL)
KEY = re.compile(r"[\w./-]+", flags=re.ASCII)
# What Hydra's language lacks outside of quotation marks travels through its parser as a stand-in.
FOREIGN = re.compile(r"[^\x00-\x7f]|[=~#()&;!<>`^]")
STAND_IN, STOOD_IN = "xCHARx{}x", re.compile(r"xCHARx(\d+)x")


def normalize_overrides(arguments: list[str]) -> list[str]:
    """Rewrite command-line arguments so that `KEY=VALUE`, `+KEY=VALUE` and `++KEY=VALUE` mean the same, and every value
    arrives.

    Unknown keys then reach `to_config`, which names the nearest known one; Hydra alone would only refuse them. Flags
    (`--help`), the stage and Hydra's own settings pass unchanged.

    Raises:
        ConfigError: arguments that set nothing, keys to be removed, or that cannot be, or whole config groups to be
            replaced.
    """
    are_flags = _are_flags(arguments)
    problems = _spaced([argument for argument, is_flag in zip(arguments, are_flags, strict=True) if not is_flag])
    normalized, is_spaced = [], bool(problems)
    for argument, is_flag in zip(arguments, are_flags, strict=True):
        if FLAG.match(argument) and not _is_known(argument):
            problems.append(_flag_problem(argument))
        elif is_flag or is_spaced:
            normalized.append(argument)
        else:
            with _kept(problems):
                normalized.append(_normalize(argument))
    if problems:
        raise ConfigError(problems)
    return normalized


@contextmanager
def _kept(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def flags_last(arguments: Sequence[str]) -> list[str]:
    """The same with all flags behind the settings: Hydra wants them in one place."""
    are_flags = _are_flags(arguments)
    of_kind = [
        [a for a, is_flag in zip(arguments, are_flags, strict=True) if is_flag == kind] for kind in (False, True)
    ]
    return of_kind[0] + of_kind[1]


def _are_flags(arguments: Sequence[str]) -> list[bool]:
    """Which arguments are flags or their values."""
    found, before = [], ""
    for argument in arguments:
        is_flag = FLAG.match(argument) is not None
        valued = before in VALUED_FLAGS or (before.startswith("-") and before not in FLAGS and "=" not in argument)
        found.append(is_flag or valued)
        before = argument if is_flag else ""
    return found


def _is_known(flag: str) -> bool:
    return flag.split("=")[0] in {*FLAGS, *VALUED_FLAGS, *OPTIONALLY_VALUED_FLAGS}


def _flag_problem(argument: str) -> str:
    name, _, value = argument.lstrip("-").partition("=")
    if name in ("resume_step", "resume-step"):
        return (
            f"{argument}: a run goes on from its newest checkpoint by itself; from another one with "
            "trainer.resume_mode=resume_path trainer.resume_from_path=.../global_step_N"
        )
    return f"{argument}: no such flag; a setting is written without dashes, {name or 'KEY'}={value or 'VALUE'}"


def _spaced(settings: Sequence[str]) -> list[str]:
    """Sentences about `KEY = VALUE`, `KEY =VALUE` and `KEY= VALUE`, which a shell makes several arguments of."""
    found, at = [], 0
    while at < len(settings):
        sizes = [size for size in (3, 2) if len(parts := settings[at : at + size]) == size and _is_spaced(parts)]
        if sizes:
            typed = settings[at : at + sizes[0]]
            found.append(f"{' '.join(typed)}: write {''.join(typed)}, without spaces around '='")
        at += sizes[0] if sizes else 1
    return found


def _is_spaced(parts: Sequence[str]) -> bool:
    if not KEY.fullmatch(parts[0].lstrip("+").rstrip("=")):
        return False
    if len(parts) == 3:
        return "=" not in parts[0] and parts[1] == "="
    around = (parts[0].endswith("=") and "=" not in parts[1]) or ("=" not in parts[0] and parts[1].startswith("="))
    return around and len(parts[0] + parts[1]) > len(parts[0].rstrip("=")) + 1


def _normalize(argument: str) -> str:
    match = ARGUMENT.fullmatch(argument)
    if argument.startswith("~"):
        raise ConfigError([f"{argument}: keys cannot be removed, only set"])
    if match is None or (FULL_WIDTH_EQUALS in match["key"]):
        if FULL_WIDTH_EQUALS in argument:
            key, _, value = argument.partition(FULL_WIDTH_EQUALS)
            raise ConfigError([f"{argument}: its equals sign is a full-width one; write {key}={value}"])
        raise ConfigError([f"{argument!r} sets nothing: expected KEY=VALUE"])
    if match["key"].startswith("hydra"):
        return argument
    key, value = _resolve_alias(match["key"].strip()), match["value"]
    if key == "stage":
        return f"stage={value}"
    if key in GROUPS or (key in _group_keys() and not value.startswith("{")):
        raise ConfigError([f"{argument}: {key} is a group; set its keys one by one, {key}.KEY=VALUE"])
    lists = [above for above in _above(key) if above in _list_keys()]
    if lists:
        raise ConfigError([f"{argument}: {lists[0]} is a list; set it whole, {lists[0]}=[A,B]"])
    return f"++{_checked(key)}={as_hydra_reads_it(value, key in _text_keys())}"


def _above(key: str) -> list[str]:
    """The keys that a dotted key would lie in."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _resolve_alias(key: str) -> str:
    for old, new in ALIASES.items():
        if key.endswith("." + old):
            return key.removesuffix(old) + new
    return key


def as_hydra_reads_it(value: str, is_text: bool = False) -> str:
    """A value that Hydra's language knows unchanged, any other as quoted text; lists and dictionaries entry by entry.

    is_text: numbers, true and false are text too; null is not.
    """
    parsed, known = _parse(value)
    if known:
        is_plain = parsed is None or isinstance(parsed, str | list | dict | QuotedString)
        return value if is_plain or not is_text else quoted(value)
    if value.startswith(("[", "{")):
        parsed, known = _parse(FOREIGN.sub(lambda letter: STAND_IN.format(ord(letter[0])), value))
        if known:
            return _write(parsed)
    return quoted(value)


def quoted(text: str) -> str:
    """Text in Hydra's single quotation marks, which take anything: a mark inside and backslashes before one doubled."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _parse(value: str) -> tuple[Any, bool]:
    """The value that Hydra's language makes of a text, and whether the text is one value and not a sweep."""
    try:
        override = OverridesParser.create().parse_override(f"++key={value}")
    except (HydraException, ValueError):
        # Python makes no integer of more than some thousand digits.
        return None, False
    return override._value, not override.is_sweep_override()


def _write(parsed: Any) -> str:
    """A parsed value in Hydra's language, its stand-ins turned back."""
    if isinstance(parsed, list):
        return "[" + ",".join(map(_write, parsed)) + "]"
    if isinstance(parsed, dict):
        return "{" + ",".join(f"{_checked(_turn_back(key))}:{_write(value)}" for key, value in parsed.items()) + "}"
    if isinstance(parsed, QuotedString | str):
        return quoted(_turn_back(parsed.text if isinstance(parsed, QuotedString) else parsed))
    return "null" if parsed is None else str(parsed)


def _turn_back(text: str) -> str:
    return STOOD_IN.sub(lambda number: chr(int(number[1])), text)


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise ConfigError([f"unknown key {key}: keys are of Latin letters, digits, '_', '-' and '.'"])
    return key


@cache
def _group_keys() -> frozenset[str]:
    """The dotted keys that hold other keys."""
    return frozenset(key for key, kinds in _keys(Config) if any(map(dataclasses.is_dataclass, kinds)))


@cache
def _text_keys() -> frozenset[str]:
    """The dotted keys that hold text, or nothing."""
    return frozenset(key for key, kinds in _keys(Config) if str in kinds and not kinds & {int, float, bool})


@cache
def _list_keys() -> frozenset[str]:
    """The dotted keys that may hold several values."""
    return frozenset(key for key, kinds in _keys(Config) if {get_origin(kind) for kind in kinds} & {list, tuple})


def _keys(settings: type, prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    """The dotted keys of the settings, groups and what is in them, each with the types that its value may have."""
    for name, kind in get_type_hints(settings).items():
        yield prefix + name, _kinds(kind)
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")


def _kinds(kind: Any) -> set[Any]:
    return set(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else {kind}
