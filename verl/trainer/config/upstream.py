"""Keys that this trainer does not have: what upstream verl's are told, and which of its own a name may mean.

`verl/config/upstream_keys.yaml` is the list. A wrong suggestion changes another model's settings, so there is none
where meaning does not decide.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

LIST = Path(__file__).parents[2] / "config" / "upstream_keys.yaml"
# What people leave out in front of the policy's parts.
POLICY = "actor_rollout_ref"
POLICY_PARTS = ("actor", "rollout", "ref", "model")
# Names of a model in a key: what says one of them never means another's.
MODELS = {"actor": "student", "rollout": "student", "ref": "reference", "critic": "discriminator"}
# How alike a mistyped name and the right one are, of 1: one letter of five differs.
ALIKE = 0.8
MOST_NAMED = 3


@dataclass(frozen=True)
class Family:
    """Keys of upstream verl's to which the same applies; `taken` None: every value."""

    keys: tuple[str, ...]
    says: str
    taken: tuple[Any, ...] | None

    def has(self, key: str) -> bool:
        """Whether the key is one of these."""
        return any(fnmatchcase(key, pattern) for pattern in self.keys)

    def takes(self, value: Any) -> bool:
        """Whether the value changes nothing here."""
        if self.taken is None:
            return True
        # To Python True is 1; here it is another value.
        return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in self.taken)


@cache
def families() -> tuple[Family, ...]:
    """The list, in the order of the file: the first family that has a key counts."""
    return tuple(
        Family(tuple(entry["keys"]), entry["says"], None if entry.get("taken") == "any" else _values(entry))
        for entry in _list()["families"]
    )


def _values(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get("taken", ()))


@cache
def _list() -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(LIST))


def family_of(key: str) -> Family | None:
    """The family of a key, whole or shortened by its `actor_rollout_ref`; None of one that the list does not have."""
    return next((family for name in _whole(key) for family in families() if family.has(name)), None)


def _whole(key: str) -> list[str]:
    return [f"{POLICY}.{key}", key] if key.split(".")[0] in POLICY_PARTS else [key]


def sort_out(unknown: dict[str, Any], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What to refuse and what to mention of keys that nothing here knows, with their values.

    Returns:
        Sentences of those that are refused; and of those that are taken and have no effect, the key and the sentence of
        its family.
    """
    refused, idle = [], {}
    for key, value in unknown.items():
        family = family_of(key)
        if family is None or _is_ours(key, family, known):
            refused.append(f"unknown key {key}{suggestion(key, known)}")
        elif not family.takes(value):
            refused.append(f"{key}={_typed(value)}: {family.says}{_way_out(family)}")
        elif family.taken is None:
            idle[key] = family.says
    return refused, idle


def _is_ours(key: str, family: Family, known: Sequence[str]) -> bool:
    """Whether a key is one of ours, shortened, or a typo of one that a family has only by a pattern."""
    names = _whole(key)
    named = any(name in family.keys for name in names)
    return any(name in known for name in names) or (not named and bool(_mistyped(_plain(key), known)))


def _way_out(family: Family) -> str:
    if family.says.startswith("named "):
        return ""
    values = [_typed(value) for value in family.taken or ()]
    return f"; leave it out, or use {values[0]}" if values else "; leave it out"


def _typed(value: Any) -> str:
    """A value as it is written on a command line."""
    return "null" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Names that are meant


def suggestion(key: str, known: Sequence[str]) -> str:
    """ "; did you mean X?", or nothing where no key has the same meaning."""
    found = meant_by(key, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def meant_by(key: str, known: Sequence[str]) -> list[str]:
    """The keys that a name may mean, three at most: a short name, parts left out, the same name elsewhere, a typo."""
    plain = _plain(key)
    short = _list()["short"].get(plain)
    if short:
        return list(short)
    exact = [name for name in _whole(plain) if name in known]
    for candidates in (exact, _with_parts(plain, known), _elsewhere(plain, known), _mistyped(plain, known)):
        if candidates:
            return candidates if len(candidates) <= MOST_NAMED else []
    return []


def _plain(key: str) -> str:
    """Without capitals and dashes: `trainer.saveFreq` and `trainer.save-freq` are `trainer.save_freq`."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).replace("-", "_").lower()


def _with_parts(key: str, known: Sequence[str]) -> list[str]:
    """Keys that have all parts of this one in their order, the same last: `actor.lr` has left out two. Of keys within
    each other's groups, the outer one."""
    parts = key.split(".")
    found = [other for other in known if other.rsplit(".", 1)[-1] == parts[-1] and _in_order(parts, other.split("."))]
    parents = {other: other.rpartition(".")[0] for other in found}
    return [
        other
        for other in found
        if not any(parents[other].startswith(f"{parents[outer]}.") for outer in found if outer != other)
    ]


def _in_order(parts: Sequence[str], others: Sequence[str]) -> bool:
    rest = iter(others)
    return all(part in rest for part in parts)


def _elsewhere(key: str, known: Sequence[str]) -> list[str]:
    """The only key of that last name, unless this one says another model than that."""
    leaf = key.rsplit(".", 1)[-1]
    found = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    return found if len(found) == 1 and _model(key) in (None, _model(found[0])) else []


def _model(key: str) -> str | None:
    return next((model for part, model in MODELS.items() if part in key.split(".")), None)


def _mistyped(key: str, known: Sequence[str]) -> list[str]:
    """The key most like this one of those in which every part is a typo of its own, or the same."""
    for name in _whole(key):
        parts = name.split(".")
        close = [other for other in known if _is_typo(parts, other.split("."))]
        best = difflib.get_close_matches(name, close, n=1, cutoff=0)
        if best:
            return best
    return []


def _is_typo(parts: Sequence[str], others: Sequence[str]) -> bool:
    return len(parts) == len(others) and all(
        part == other or difflib.SequenceMatcher(None, part, other).ratio() >= ALIKE
        for part, other in zip(parts, others, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# For the documentation


def table() -> str:
    """The list as a table in Markdown."""
    lines = ["| key of verl | taken as it is | here |", "|---|---|---|"]
    for family in families():
        keys = ", ".join(f"`{key}`" for key in family.keys)
        taken = "any value" if family.taken is None else ", ".join(f"`{_typed(value)}`" for value in family.taken)
        lines.append(f"| {keys} | {taken or 'no'} | {family.says.replace('|', '/')} |")
    return "\n".join(lines)
