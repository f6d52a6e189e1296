"""Which settings each stage gets: those of its script in scripts/train, then the user's.

`stage_arguments` gives what `scripts/train/common.sh` gives; a test holds one against the other.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from verl.config.run import Config
from verl.pipeline.options import STAGES
from verl.trainer.config import ConfigError, compose_config
from verl.trainer.config.loading import known_keys
from verl.trainer.config.overrides import quoted

WITH_CRITIC = ("warmup", "gad")
# Settings without a stage before them go where they have an effect. A name that ends in "." or "_" is a beginning.
APPLIES = {
    "critic.": WITH_CRITIC,
    "algorithm.": WITH_CRITIC,
    "soda.": ("soda",),
    "trainer.critic_warmup": WITH_CRITIC,
    "trainer.warmup_use_sft": ("warmup",),
    "trainer.sft_monitor_freq": ("seqkd",),
    "actor_rollout_ref.rollout.n": WITH_CRITIC,
    "actor_rollout_ref.ref.": WITH_CRITIC,
    **{
        f"actor_rollout_ref.actor.{name}": WITH_CRITIC
        for name in (
            "sft_anchor_",
            "use_kl_loss",
            "kl_loss_",
            "policy_loss.",
            "clip_ratio",
            "clip_ratio_",
            "entropy_coeff",
        )
    },
}
# What the pipeline decides, and the flag that says it, if there is one.
OWN = {
    "stage": "--stages",
    "data.train_files": "--data",
    "data.val_files": "--val",
    "actor_rollout_ref.model.path": "--model",
    "critic.model.path": "--reward_model",
    "trainer.experiment_name": "--exp_name",
    "trainer.default_local_dir": "--out",
    "trainer.nnodes": "--nnodes",
    "trainer.resume_mode": None,
    "trainer.resume_from_path": None,
    "trainer.val_only": None,
}
SETTING = re.compile(rf"(?P<plus>\+{{0,2}})(?:(?P<stage>{'|'.join(STAGES)})\.)?(?P<key>[^=]*)=", flags=re.DOTALL)


@dataclass(frozen=True)
class Models:
    """What a stage begins with. `pending`: both are stand-ins, as the stage before is still to make them."""

    student: str
    critic: str
    pending: bool = False


@dataclass(frozen=True)
class Given:
    """A setting of the command line, without its stage, and the stages it goes to. `own`: it was given to one."""

    text: str
    stages: tuple[str, ...]
    own: bool


def read_setting(text: str) -> Given:
    """Tell a stage before a key from the key's own beginning; `soda.beta` is a key.

    Raises:
        ConfigError: it sets nothing, or what the pipeline decides.
    """
    match = SETTING.match(text)
    if match is None:
        raise ConfigError([f"{text!r} sets nothing: expected KEY=VALUE, or STAGE.KEY=VALUE"])
    stage, key, rest = match["stage"], match["key"], text[match.end() - 1 :]
    if stage and f"{stage}.{key}" in known_keys():
        stage, key = None, f"{stage}.{key}"
    if key in OWN:
        way = f"give {OWN[key]} instead" if OWN[key] else "leave it out"
        raise ConfigError([f"{text}: the pipeline decides {key}; {way}"])
    return Given(f"{match['plus']}{key}{rest}", (stage,) if stage else _applies(key), stage is not None)


def _applies(key: str) -> tuple[str, ...]:
    found = (name for name in APPLIES if key == name or (name[-1] in "._" and key.startswith(name)))
    return next((APPLIES[name] for name in found), STAGES)


def user_settings(options: Namespace) -> dict[str, list[str]]:
    """The settings of each stage as the user gave them, those for several stages before the stage's own.

    Raises:
        ConfigError: with all of them that are none.
    """
    order = sorted(_given(options), key=lambda setting: setting.own)
    return {stage: [setting.text for setting in order if stage in setting.stages] for stage in STAGES}


def _given(options: Namespace) -> list[Given]:
    given, problems = [], []
    for text in options.settings:
        try:
            given.append(read_setting(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return given


def unused_settings(options: Namespace) -> list[Given]:
    """The user's settings that no stage of this line gets. Errors as `user_settings`."""
    return [setting for setting in _given(options) if not set(setting.stages) & set(options.stages)]


def run_folder(options: Namespace, stage: str) -> Path:
    """Where a stage's checkpoints go."""
    return options.out / stage


def ranks_per_node() -> int:
    """N_GPUS_PER_NODE, or as many as this machine has GPUs, or one."""
    return int(os.environ.get("N_GPUS_PER_NODE") or max(1, torch.cuda.device_count()))


def stage_arguments(
    stage: str, models: Models, train: Sequence[str], val: Sequence[str], name: str, nnodes: int, ranks: int
) -> list[str]:
    """The trainer's arguments for a stage, as the stage's script gives them."""
    critic = [f"critic.model.path={models.critic}"] if stage in WITH_CRITIC else []
    return [
        f"stage={stage}",
        f"data.train_files={_files(train)}",
        f"data.val_files={_files(val)}",
        f"actor_rollout_ref.model.path={models.student}",
        *critic,
        f"trainer.experiment_name={name}",
        f"trainer.nnodes={nnodes}",
        f"trainer.n_gpus_per_node={ranks}",
    ]


def _files(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "[" + ",".join(map(quoted, names)) + "]"


def arguments_of(options: Namespace, stage: str, models: Models) -> list[str]:
    """The trainer's whole command line for a stage of this pipeline."""
    name = f"{options.exp_name}/{stage}"
    fixed = stage_arguments(stage, models, options.data, options.val, name, options.nnodes, ranks_per_node())
    return [*fixed, f"trainer.default_local_dir={run_folder(options, stage)}", *user_settings(options)[stage]]


def compose(options: Namespace, stage: str, models: Models) -> Config:
    """The settings that the trainer would run a stage with; ConfigError as there."""
    return compose_config(arguments_of(options, stage, models))
