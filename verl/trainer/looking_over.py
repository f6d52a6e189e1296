"""What is looked at before a run starts: settings against the machine, folders, models, data. Of everything that is
wrong, each is told, together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl.models.finding import find_model, is_discriminator
from verl.models.tokenizer import all_eos_token_ids
from verl.trainer.config import Config, DataConfig
from verl.trainer.config.value_checks import NO_TEXT, doubt_of_rows, doubts
from verl.trainer.ppo.checkpointing import may_resume_critic, named_checkpoint
from verl.trainer.ppo.model_checks import check_device, check_engine, check_models, check_tokens
from verl.utils.dataset.rl_dataset import RLHFDataset, find_files
from verl.utils.hub import parse_hub_name
from verl.utils.refusals import Findings, sentences_of
from verl.utils.run_lock import check_writable
from verl.utils.run_log import phase
from verl.utils.tracking import check_loggers

logger = logging.getLogger(__name__)


def create_rl_dataset(
    data_paths: str | list[str],
    data_config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_samples: int = -1,
    eos_token_ids: tuple[int, ...] = (),
) -> RLHFDataset:
    """The rows of one or several files, checked; ValueError for bad rows (see `RLHFDataset`)."""
    return RLHFDataset(
        data_paths,
        tokenizer,
        data_config,
        max_samples=max_samples,
        eos_token_ids=eos_token_ids,
        special_token_text=data_config.special_token_text,
        cache_dir=data_config.cache_dir,
        turns=data_config.turns,
    )


def check_folders(config: Config) -> None:
    """OSError for folders beside the run's own: those that the run is to write and cannot, and a checkpoint's that is
    not there."""
    trainer = config.trainer
    folders = {"rollout_data_dir": trainer.rollout_data_dir, "validation_data_dir": trainer.validation_data_dir}
    if "tensorboard" in trainer.logger:
        folders["default_tensorboard_dir"] = trainer.default_tensorboard_dir
    findings = Findings()
    for setting, folder in folders.items():
        with findings.gathered():
            if folder is not None:
                check_writable(Path(folder).expanduser(), f"trainer.{setting}")
    # Nothing more of checkpoints: they may be those of another run that is at work here.
    with findings.gathered():
        if trainer.resume_mode == "resume_path":
            named_checkpoint(trainer)
    findings.tell()


def check_data_files(data: DataConfig) -> None:
    """The files of both settings are there, or it is told which are not."""
    findings = Findings()
    for setting in ("train_files", "val_files"):
        with findings.gathered():
            if getattr(data, setting) is not None:
                find_files(getattr(data, setting))
    findings.tell()


def missing_paths(config: Config) -> list[str]:
    """Sentences about data files and model folders that are not there; names of the hub are not asked for."""
    findings = Findings()
    for names in (config.data.train_files, config.data.val_files):
        for name in [names] if isinstance(names, str) else names or []:
            with findings.gathered():
                if name not in NO_TEXT and parse_hub_name(name, "dataset") is None:
                    find_files(name)
    models = [config.actor_rollout_ref.model.path] + [config.critic.model.path] * config.use_critic
    for path in dict.fromkeys(models):
        with findings.gathered():
            if parse_hub_name(path, "model") is None:
                find_model(path)
    return [sentence for error in findings.errors for sentence in sentences_of(error)]


def look_over(
    config: Config, findings: Findings, begin: Callable[[], None] | None = None
) -> PreTrainedTokenizerBase | None:
    """Look at everything but the rows of the data, which take longest; returns the student's tokenizer, if that can be
    had.

    Args:
        begin: called before models' files are looked into, where nothing has been found that keeps the run from
            starting.
    """
    tokenizer = None
    with findings.gathered():
        check_loggers(config.trainer.logger)
    with findings.gathered():
        check_folders(config)
    with findings.gathered():
        check_device(config)
    with findings.gathered():
        check_engine(config)
    with findings.gathered():
        check_data_files(config.data)
    if begin is not None and not findings and not missing_paths(config):
        begin()
    with findings.gathered(), phase("reading tokenizer and model files"):
        tokenizer = check_models(config)
    return tokenizer


def without_idle_critic(config: Config) -> Config:
    """Without a discriminator where only the student is looked at: `trainer.val_only`, and neither the settings nor a
    checkpoint have a trained one."""
    if not (config.trainer.val_only and config.use_critic):
        return config
    with suppress(OSError, ValueError):
        if not may_resume_critic(config.trainer) and not is_discriminator(config.critic.model.path):
            logger.info("trainer.val_only=True: no discriminator takes part, as critic.model.path names no trained one")
            return replace(config, trainer=replace(config.trainer, critic_warmup=-1))
    return config


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[RLHFDataset, RLHFDataset | None]:
    """Training and validation rows; what is wrong with either is told."""
    data, findings, val = config.data, Findings(), None
    if config.custom_reward_function.path is not None:
        data = replace(data, return_raw_chat=True)
    ends = all_eos_token_ids(tokenizer, config.actor_rollout_ref.model.path)
    with phase("reading data"):
        with findings.gathered():
            train = create_rl_dataset(data.train_files, data, tokenizer, data.train_max_samples, ends)
        with findings.gathered():
            if data.val_files is not None:
                # Validation shows what the user said last.
                asked = replace(data, return_raw_chat=True)
                val = create_rl_dataset(data.val_files, asked, tokenizer, data.val_max_samples, ends)
        findings.tell()
    return train, val


def look_at(
    config: Config, begin: Callable[[], None] | None = None
) -> tuple[PreTrainedTokenizerBase, RLHFDataset, RLHFDataset | None]:
    """The student's tokenizer, training and validation data; of everything that is wrong, each is told. `begin`: as of
    `look_over`."""
    findings = Findings()
    tokenizer = look_over(config, findings, begin)
    findings.tell()
    for doubt in doubts(config):
        logger.warning("%s", doubt)
    train, val = read_data(config, tokenizer)
    for doubt in doubt_of_rows(len(train), config):
        logger.warning("%s", doubt)
    check_tokens(config, tokenizer, [train] if val is None else [train, val])
    return tokenizer, train, val
