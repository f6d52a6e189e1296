"""From command line to `Config`: overrides are normalised, composed by Hydra, typed, and checked as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from verl.trainer.config.checks import find_conflicts
from verl.trainer.config.schema import Config

# In the YAML: what a run has by default where there is a GPU, and what follows from `trainer.device`.
OmegaConf.register_new_resolver("default_device", lambda: "cuda" if torch.cuda.is_available() else "cpu", replace=True)
OmegaConf.register_new_resolver(
    "by_device", lambda cuda, cpu, *, _root_: cuda if _root_.trainer.device == "cuda" else cpu, replace=True
)

CONFIG_DIR = Path(__file__).parent
GROUPS = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}

# Names from older scripts and notes, and the key that has the effect.
ALIASES = {
    "optim.warmup_style": "optim.lr_scheduler_type",
    "optim.lr_scheduler.type": "optim.lr_scheduler_type",
    "optim.lr_scheduler.warmup_steps": "optim.lr_warmup_steps",
    "optim.lr_scheduler.total_steps": "optim.total_training_steps",
}


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in one message."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n{lines}")


def _resolve_alias(key: str) -> str:
    for old, new in ALIASES.items():
        if key.endswith("." + old):
            return key.removesuffix(old) + new
    return key


def normalize_overrides(arguments: list[str]) -> list[str]:
    """Rewrite command-line arguments so that `KEY=VALUE`, `+KEY=VALUE` and `++KEY=VALUE` mean the same.

    Unknown keys then reach `to_config`, which names the nearest known one; Hydra alone would only refuse them. Flags
    (`--help`), the stage and Hydra's own settings pass unchanged.

    Raises:
        ConfigError: a key to be removed, or a whole group to be replaced.
    """
    result = []
    for argument in arguments:
        match = re.match(r"^\+{0,2}([^=+~@\s-][^=@\s]*)(=.*)$", argument, flags=re.DOTALL)
        if argument.startswith("~"):
            raise ConfigError([f"{argument}: keys cannot be removed, only set"])
        if match is None or match[1].startswith("hydra"):
            result.append(argument)
        elif match[1] == "stage":
            result.append(f"stage{match[2]}")
        elif match[1] in GROUPS:
            raise ConfigError([f"{argument}: {match[1]} is a group; set its keys one by one, {match[1]}.KEY=VALUE"])
        else:
            result.append(f"++{_resolve_alias(match[1])}{match[2]}")
    return result


def known_keys(settings: type = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration, dotted, groups included."""
    keys = []
    for name, kind in get_type_hints(settings).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def _take_unknown(tree: dict[str, Any], known: list[str], prefix: str = "") -> list[str]:
    """Remove the keys that nothing knows from a composed tree, in place, and return them dotted."""
    unknown = []
    for name, value in list(tree.items()):
        key = prefix + name
        is_free_dict = key in known and not any(k.startswith(key + ".") for k in known)
        if isinstance(value, dict) and not is_free_dict:
            unknown += _take_unknown(value, known, key + ".")
        elif key not in known:
            unknown.append(key)
        if key not in known:
            del tree[name]
    return unknown


def _take_missing(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys still to be given; they get a stand-in text, so that the rest can be checked too."""
    missing = []
    for name, value in tree.items():
        if isinstance(value, dict):
            missing += _take_missing(value, f"{prefix}{name}.")
        elif value == "???":
            tree[name] = "not set"
            missing.append(prefix + name)
    return missing


def _nearest(key: str, known: list[str]) -> str:
    """The known key most like this one: the same last name elsewhere first, then by spelling."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5)
    return f"; did you mean {close[0]}?" if close else ""


REQUIRED = {
    "data.train_files": "a parquet or jsonl file of prompts and teacher answers",
    "actor_rollout_ref.model.path": "a Hugging Face folder, or a checkpoint's actor folder",
    "trainer.experiment_name": "a name for this run; its checkpoints go under it",
}


def _type_problems(error: ValidationError, known: list[str]) -> list[str]:
    problems: dict[str, str] = {}
    for item in error.errors():
        # A value of several allowed types is reported once for each; the key is the longest known part of the place.
        parts = [str(part) for part in item["loc"]]
        key = next(k for k in (".".join(parts[:end]) for end in range(len(parts), 0, -1)) if k in known)
        problems.setdefault(key, f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return list(problems.values())


def to_config(composed: DictConfig) -> Config:
    """Type and check a composed configuration.

    Raises:
        ConfigError: with every problem found: missing, unknown and mistyped keys, or, once those are right, settings
            that contradict each other.
    """
    known = known_keys()
    tree = OmegaConf.to_container(composed, resolve=False)
    problems = [f"{key} is not set: give {REQUIRED[key]}" for key in _take_missing(tree)]
    problems += [f"unknown key {key}{_nearest(key, known)}" for key in _take_unknown(tree, known)]
    try:
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        config = TypeAdapter(Config).validate_python(values)
    except OmegaConfBaseException as error:
        problems.append(str(error).splitlines()[0])
    except ValidationError as error:
        problems += _type_problems(error, known)
    if problems:
        raise ConfigError(problems)
    conflicts = find_conflicts(config)
    if conflicts:
        raise ConfigError(conflicts)
    return config


def compose_config(overrides: list[str]) -> Config:
    """The configuration that `python -m verl.trainer.main_ppo OVERRIDES` would run with."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_config(compose("ppo_trainer", overrides=normalize_overrides(overrides)))
