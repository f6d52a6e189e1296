"""Models and data of a run, looked at before it starts, after `first_look.py`. All that is wrong is told together."""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from verl.models.tokenizer import all_eos_token_ids
from verl.trainer.config import Config, DataConfig
from verl.trainer.config.value_checks import doubt_of_rows, doubts
from verl.trainer.ppo.model_checks import check_models, check_tokens
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.refusals import Findings
from verl.utils.run_log import phase

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


def look_over(config: Config, findings: Findings) -> PreTrainedTokenizerBase | None:
    """Look at the models; returns the student's tokenizer, if that can be had.

    Args:
        findings: those of `look_first`.
    """
    tokenizer = None
    with findings.gathered(), phase("reading tokenizer and model files"):
        tokenizer = check_models(config)
    return tokenizer


def look_at(config: Config, findings: Findings) -> tuple[PreTrainedTokenizerBase, RLHFDataset, RLHFDataset | None]:
    """The student's tokenizer, training and validation data; of everything that is wrong, each is told. `findings`: as
    of `look_over`."""
    tokenizer = look_over(config, findings)
    findings.tell()
    for doubt in doubts(config):
        logger.warning("%s", doubt)
    train, val = read_data(config, tokenizer)
    for doubt in doubt_of_rows(len(train), config):
        logger.warning("%s", doubt)
    check_tokens(config, tokenizer, [train] if val is None else [train, val])
    return tokenizer, train, val
