"""Checks of a run's models before any worker process starts: they are there, whole, and belong together."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from verl.config import ModelConfig
from verl.config.run import Config, DataConfig
from verl.models.answer_models import ANSWER_MODELS
from verl.models.loading import (
    Kind,
    check_files,
    check_head,
    check_labels,
    context_length,
    find_class,
    find_tokenizer,
    is_discriminator,
    load_config,
    load_tokenizer,
    refuse_discriminator,
)
from verl.models.proof import check_class
from verl.trainer.ppo.discriminator_algos import get_discriminator_loss_fn
from verl.utils.checkpoint.whole import refuse_pointers
from verl.utils.command_line import called_as
from verl.utils.dataset.tokenizer_checks import check_ids
from verl.utils.refusals import Findings

logger = logging.getLogger(__name__)


def _look_at(model: ModelConfig, kind: Kind, key: str, data: DataConfig) -> PreTrainedTokenizerBase:
    """Check all that a model's folder tells about its use for rows of `data`'s limits; returns its tokenizer."""
    refuse_pointers(find_tokenizer(model.tokenizer_path or model.path))
    tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
    check_ids(tokenizer)
    # The rank that reads the weights compares the contents of a copy in memory itself.
    check_files(model.path, contents=not model.use_shm)
    if kind == "policy":
        refuse_discriminator(model.path)
    else:
        check_labels(model.path)
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    try:
        _check_context(config, model.path, data)
        _check_vocabulary(config, tokenizer)
        model_class = find_class(config, kind, model.trust_remote_code)
        check_class(ANSWER_MODELS[kind], model_class, config, model.use_remove_padding, _longest(data))
        if kind == "policy":
            check_head(model.path, config, model.trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{key}.path={model.path}: {error}") from error
    return tokenizer


def _longest(data: DataConfig) -> int:
    return data.max_prompt_length + data.max_response_length


def _check_context(config: PretrainedConfig, path: str, data: DataConfig) -> None:
    context, longest = context_length(config), _longest(data)
    if context is not None and longest > context:
        files = [data.train_files] if isinstance(data.train_files, str) else data.train_files
        lengths = f"{called_as('verl.data_tools.lengths')} --data {shlex.join(files)} --model {shlex.quote(path)}"
        raise ValueError(
            f"data.max_prompt_length + data.max_response_length = {longest} is above "
            f"max_position_embeddings={context}, the model's context: shorten them, or raise "
            "override_config.max_position_embeddings of a model with rotary positions that is to work beyond it. "
            f"Values that fit the data: {lengths}"
        )


def _check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens that every batch has must have an embedding; for others see `check_tokens`."""
    size = config.get_text_config().vocab_size
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= size:
            raise ValueError(_without_embedding(f"the tokenizer's {name} {getattr(tokenizer, name)!r}", token, size))


def _without_embedding(what: str, token: int, size: int) -> str:
    return (
        f"{what} has number {token}, and the model's embedding (vocab_size) has {size} rows: resize it "
        "(model.resize_token_embeddings) and save the model, or use the tokenizer that belongs to it"
    )


def check_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, datasets: Iterable[Dataset]) -> None:
    """ValueError if a row has a token for which the student has no embedding; names the row. Rows are read only where
    the tokenizer has such tokens at all."""
    model = config.actor_rollout_ref.model
    student = load_config(model.path, "policy", model.override_config, model.trust_remote_code)
    size = student.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values()) < size:
        return
    for dataset in datasets:
        for number in range(len(dataset)):
            row = dataset[number]
            for key in ("input_ids", "teacher_response"):
                token = int(row[key].max())
                if token >= size:
                    text = tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(_without_embedding(f"token {text!r}, in row {number} of the data,", token, size))


def check_device(config: Config) -> None:
    """ValueError if the run is to use GPUs, and there is none on this machine, which is the only one."""
    address = config.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS")
    if config.trainer.device == "cuda" and not torch.cuda.is_available() and not address:
        raise ValueError(
            "trainer.device=cuda, and torch finds no GPU on this machine: set trainer.device=cpu, or see what "
            "nvidia-smi and CUDA_VISIBLE_DEVICES say, and for which CUDA torch was built (python -m "
            "torch.utils.collect_env)"
        )


def check_engine(config: Config) -> None:
    """ModuleNotFoundError if the generation engine is not installed."""
    if config.actor_rollout_ref.rollout.name == "vllm" and find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "actor_rollout_ref.rollout.name=vllm, the default on GPUs, needs vLLM, which is not installed: "
            "pip install -e '.[gpu]', or set actor_rollout_ref.rollout.name=hf, which is slow"
        )


def check_models(config: Config) -> PreTrainedTokenizerBase:
    """Check the student and, if there is one, the discriminator; returns the student's tokenizer.

    Raises:
        FileNotFoundError: a folder holds no model.
        ValueError: a folder is not whole, or the student's holds a discriminator; a model's values would be wrong (see
            `check_class`), its context is shorter than a row, or it has no embedding for a token; a tokenizer makes
            other ids than its tokenizer.json, or the discriminator's other ones than the student's; or GAD starts
            without a warmed-up discriminator.
    """
    findings, tokenizer, other = Findings(), None, None
    with findings.gathered():
        tokenizer = _look_at(config.actor_rollout_ref.model, "policy", "actor_rollout_ref.model", config.data)
    with findings.gathered():
        if config.use_critic:
            other = _look_at(config.critic.model, "score", "critic.model", config.data)
    if config.use_critic and config.critic.model.path == config.actor_rollout_ref.model.path:
        _tell_once(findings)
    findings.tell()
    if config.use_critic:
        _check_discriminator(config, tokenizer, other)
    return tokenizer


def _tell_once(findings: Findings) -> None:
    """Of what was found of one folder, as the student's and as the discriminator's: the same reason once."""
    findings.errors = list({str(error.__cause__ or error): error for error in reversed(findings.errors)}.values())[::-1]


def _check_discriminator(config: Config, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """The discriminator, whose tokenizer is `other`, belongs to the student and has learned where it has to."""
    path = config.critic.model.path
    if other.get_vocab() != tokenizer.get_vocab() or other.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"the discriminator in {path} has another tokenizer than the student in "
            f"{config.actor_rollout_ref.model.path} ({len(other)} tokens, EOS {other.eos_token_id}, against "
            f"{len(tokenizer)}, EOS {tokenizer.eos_token_id}): it would misread the answers; use models of one family"
        )
    rewards = not config.trainer.warmup_use_sft and not config.trainer.val_only
    if rewards and config.trainer.critic_warmup == 0 and not is_discriminator(path):
        raise ValueError(
            f"{path} is a language model, and an untrained discriminator would reward noise: pass a warmed-up critic "
            "(critic.model.path, --reward_model), or let it learn first with trainer.critic_warmup=N steps or auto"
        )
    if not is_discriminator(path):
        logger.info("%s is a language model: the discriminator starts from it with a fresh score head", path)
    _warn_of_other_scoring(config)


def _warn_of_other_scoring(config: Config) -> None:
    """Warn of a warmed-up discriminator that was trained with another pooling or EOS setting: its scores will mean
    something else at first."""
    settings = config.critic.discriminator
    pooling = settings.pooling or get_discriminator_loss_fn(settings.loss).pooling
    now = {"pooling": pooling, "exclude_eos": settings.exclude_eos}
    model = config.critic.model
    trained = getattr(load_config(model.path, "score", None, model.trust_remote_code), "discriminator", now)
    differing = [f"{key}={trained[key]}" for key in now if trained[key] != now[key]]
    if differing:
        logger.warning(
            "the discriminator in %s was trained with critic.discriminator.%s, and this run uses %s: its scores will "
            "mean something else at first",
            model.path, ", ".join(differing), ", ".join(f"{key}={value}" for key, value in now.items()),
        )  # fmt: skip
