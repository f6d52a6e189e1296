"""Paths as a run's workers need them: they may run in another folder than the driver, and later than it started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from verl.config import ModelConfig
from verl.config.run import Config
from verl.utils.checkpoint.best_link import behind_best
from verl.utils.user_code import is_user_function, with_absolute_path

AnyModelConfig = TypeVar("AnyModelConfig", bound=ModelConfig)


def with_absolute_paths(config: Config) -> Config:
    """The settings with absolute paths of models and of a discriminator loss from a user's file.

    A path through a run's `best` link becomes that of the checkpoint it names now. So this is done when a run starts,
    not when its settings are composed.
    """
    policy_settings, critic = config.actor_rollout_ref, config.critic
    discriminator = critic.discriminator
    if is_user_function(discriminator.loss):
        discriminator = replace(discriminator, loss=with_absolute_path(discriminator.loss))
    return replace(
        config,
        actor_rollout_ref=replace(policy_settings, model=_absolute(policy_settings.model)),
        critic=replace(critic, model=_absolute(critic.model), discriminator=discriminator),
    )


def _absolute(model: AnyModelConfig) -> AnyModelConfig:
    given = {key: getattr(model, key) for key in ("path", "tokenizer_path")}
    paths = {key: Path(path).expanduser().absolute() for key, path in given.items() if path is not None}
    return replace(model, **{key: str(behind_best(path)) for key, path in paths.items()})
