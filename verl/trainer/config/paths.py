"""Paths as a run's workers need them: they may run in another folder than the driver, and later than it started.

Names of the Hugging Face hub become paths in its cache, of the commit that they mean now.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from verl.config import ModelConfig
from verl.config.run import Config
from verl.utils.checkpoint.best_link import behind_best
from verl.utils.hub import data_files, model_folder
from verl.utils.refusals import Findings
from verl.utils.user_code import is_user_function, with_absolute_path

AnyModelConfig = TypeVar("AnyModelConfig", bound=ModelConfig)


def with_absolute_paths(config: Config) -> Config:
    """The settings with absolute paths of models and of a discriminator loss from a user's file; what is named as on
    the hub is fetched (`verl.utils.hub`, also for the errors).

    A path through a run's `best` link becomes that of the checkpoint it names now. So this is done when a run starts,
    not when its settings are composed.
    """
    policy_settings, critic, data = config.actor_rollout_ref, config.critic, config.data
    discriminator = critic.discriminator
    if is_user_function(discriminator.loss):
        discriminator = replace(discriminator, loss=with_absolute_path(discriminator.loss))
    findings = Findings()
    with findings.gathered():
        data = replace(data, train_files=_files(data.train_files, "train"))
    with findings.gathered():
        data = replace(data, val_files=_files(data.val_files))
    with findings.gathered():
        policy_settings = replace(policy_settings, model=_absolute(policy_settings.model))
    with findings.gathered():
        critic = replace(critic, model=_absolute(critic.model, config.use_critic), discriminator=discriminator)
    findings.tell()
    return replace(config, data=data, actor_rollout_ref=policy_settings, critic=critic)


def _absolute(model: AnyModelConfig, used: bool = True) -> AnyModelConfig:
    given = {key: path for key in ("path", "tokenizer_path") if (path := getattr(model, key)) is not None}
    found = {key: model_folder(path) if used else path for key, path in given.items()}
    paths = {key: behind_best(Path(path).expanduser().absolute()) for key, path in found.items()}
    return replace(model, **{key: str(path) for key, path in paths.items()})


def _files(names: str | list[str] | None, default_split: str | None = None) -> str | list[str] | None:
    """Data files; None and paths stay as they are."""
    if names is None:
        return None
    typed = [names] if isinstance(names, str) else names
    files = [file for name in typed for file in data_files(name, default_split)]
    return names if files == typed else files
