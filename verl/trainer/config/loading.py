"""From command line to `Config`: overrides (`overrides.py`) are composed by Hydra, typed, and checked as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from verl.config.run import Config
from verl.trainer.config.checks import find_conflicts
from verl.trainer.config.errors import ConfigError
from verl.trainer.config.overrides import ARGUMENT, CONFIG_DIR, normalize_overrides
from verl.trainer.config.stages import stage_conflicts
from verl.trainer.config.upstream import family_of, sort_out
from verl.utils.devices import sees_cuda

logger = logging.getLogger(__name__)

# In the YAML: what a run has by default where there is a GPU, and what follows from `trainer.device`.
OmegaConf.register_new_resolver("default_device", lambda: "cuda" if sees_cuda() else "cpu", replace=True)
OmegaConf.register_new_resolver(
    "by_device", lambda cuda, cpu, *, _root_: cuda if _root_.trainer.device == "cuda" else cpu, replace=True
)


def known_keys(settings: type = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration, dotted, groups included."""
    keys = []
    for name, kind in get_type_hints(settings).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def _take_unknown(tree: dict[str, Any], known: list[str], prefix: str = "") -> dict[str, Any]:
    """Remove the keys that nothing knows from a composed tree, in place, and return them dotted, with their values."""
    unknown = {}
    for name, value in list(tree.items()):
        key = prefix + name
        is_free_dict = key in known and not any(k.startswith(key + ".") for k in known)
        if isinstance(value, dict) and is_free_dict:
            unknown |= {f"{key}.{entry}": value.pop(entry) for entry in list(value) if family_of(f"{key}.{entry}")}
        elif isinstance(value, dict):
            unknown |= _take_unknown(value, known, key + ".")
        elif key not in known:
            unknown[key] = value
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


def preset_settings(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that `stage=STAGE` sets, nested, with a stand-in for what a command line has to give. What follows
    from other settings has the value that follows from those of a run, `settings`."""
    preset = composed_preset(stage)
    followed = OmegaConf.to_container(OmegaConf.create(_joined(preset, settings)), resolve=True)
    return _joined(followed, preset)


@contextmanager
def _hydra_of_our_own() -> Iterator[None]:
    """Hydra over this package's configuration; one at work already, as in every command's run, goes on after it."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


@cache
def composed_preset(stage: str) -> dict[str, Any]:
    """What `stage=STAGE` writes, nested, with "${...}" for what follows from other settings; not to be changed."""
    with _hydra_of_our_own():
        preset = OmegaConf.to_container(compose("ppo_trainer", overrides=[f"stage={stage}"]), resolve=False)
    _take_missing(preset)
    return preset


def _joined(tree: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """A tree with the values of another one; where either of the two follows from other settings, the tree's own."""
    joined = {}
    for name, value in tree.items():
        other = others.get(name, value)
        if isinstance(value, dict) and isinstance(other, dict):
            joined[name] = _joined(value, other)
        else:
            joined[name] = value if any(isinstance(each, str) and "${" in each for each in (value, other)) else other
    return joined


REQUIRED = {
    "data.train_files": "a parquet or jsonl file of prompts and teacher answers",
    "actor_rollout_ref.model.path": "a Hugging Face folder, or a checkpoint's actor folder",
    "trainer.experiment_name": "a name for this run; its checkpoints go under it",
}


def _type_problems(error: ValidationError, known: list[str], missing: list[str]) -> list[str]:
    problems: dict[str, str] = {}
    for item in error.errors():
        # A value of several allowed types is reported once for each; the key is the longest known part of the place.
        parts = [str(part) for part in item["loc"]]
        key = next(k for k in (".".join(parts[:end]) for end in range(len(parts), 0, -1)) if k in known)
        problems.setdefault(key, f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return [problem for key, problem in problems.items() if key not in missing]


def to_config(composed: DictConfig, overrides: Sequence[str] | None = None) -> Config:
    """Type and check a composed configuration.

    Args:
        overrides: what the command line sets, for what only it can tell: whether it names the stage.

    Raises:
        ConfigError: with every problem found: missing, unknown and mistyped keys, or, once those are right, settings
            that contradict each other.
    """
    known = known_keys()
    tree = OmegaConf.to_container(composed, resolve=False)
    missing = _take_missing(tree)
    problems = [f"{key} is not set: give {REQUIRED.get(key, 'it a value')}" for key in missing]
    refused, idle = sort_out(_take_unknown(tree, known), known)
    problems += refused
    try:
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        config = TypeAdapter(Config).validate_python(values)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        problems.append(f"{error.full_key}: {said}" if error.full_key else said)
    except ValidationError as error:
        problems += _type_problems(error, known, missing)
    if problems:
        raise ConfigError(problems)
    conflicts = find_conflicts(config)
    if overrides is not None:
        conflicts += stage_conflicts(config, overrides)
    if conflicts:
        raise ConfigError(conflicts, config)
    for why in dict.fromkeys(idle.values()):
        logger.info("%s: %s", ", ".join(key for key in idle if idle[key] == why), why)
    return config


@contextmanager
def explain_refusals() -> Iterator[None]:
    """Hydra's errors, of an override that it cannot take, become ConfigErrors with its words and their cause."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not error.options:
            raise ConfigError([" ".join(str(error).split())]) from error
        close = difflib.get_close_matches(name.lower(), error.options, n=1, cutoff=0.5)
        there_are = f"did you mean {close[0]}? There are" if close else "there are"
        raise ConfigError([f"{group}={name} is not known: {there_are} {', '.join(error.options)}"]) from error
    except HydraException as error:
        said = dict.fromkeys(" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise ConfigError([": ".join(said)]) from error


def compose_config(overrides: list[str]) -> Config:
    """The configuration that `python -m verl.trainer.main_ppo OVERRIDES` would run with."""
    with _hydra_of_our_own():
        with explain_refusals():
            normalized = normalize_overrides(overrides)
            composed = compose("ppo_trainer", overrides=normalized)
        return to_config(composed, normalized)


def check_shown(arguments: Sequence[str]) -> list[str]:
    """Check the settings that `--cfg job` shows, as a run would; what has only not been given yet may be.

    Args:
        arguments: the command line's, normalized.

    Returns:
        The keys that are still to be given.

    Raises:
        ConfigError: everything else that a run would refuse.
    """
    overrides = [argument for argument in arguments if ARGUMENT.fullmatch(argument)]
    with _hydra_of_our_own(), explain_refusals():
        composed = compose("ppo_trainer", overrides=list(overrides))
        missing = _take_missing(OmegaConf.to_container(composed, resolve=False))
        to_come = [key for key in missing if key in REQUIRED]
        to_config(compose("ppo_trainer", overrides=[*overrides, *(f"{key}=to_come" for key in to_come)]), overrides)
    return to_come
