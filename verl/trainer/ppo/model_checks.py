"""Checks of a run's models before any worker process starts: they are there, whole, and belong together."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.config import ModelConfig
from verl.config.run import Config, DataConfig
from verl.models.adapters import (
    adapted_layers,
    adapters_of,
    add_adapters,
    base_in_4bit,
    fresh_adapters,
    load_adapters,
)
from verl.models.adapters_proof import check_merging
from verl.models.answer_models import ANSWER_MODELS
from verl.models.finding import base_of, check_files, config_entries, find_model, is_discriminator, refuse_discriminator
from verl.models.four_bit import linear_layers
from verl.models.loading import (
    Kind,
    check_head,
    check_labels,
    context_length,
    empty_model,
    find_class,
    load_config,
)
from verl.models.proof import check_class
from verl.models.reward_models import POOLING, is_reward_model
from verl.models.row_mixers import costs_beside_packing
from verl.models.sequence_parallel import check_shared_heads
from verl.models.shared_base import shares_base, trains_adapters, why_not_shared
from verl.models.tokenizer import find_tokenizer, load_tokenizer
from verl.trainer.ppo.discriminator_algos import get_discriminator_loss_fn
from verl.trainer.ppo.own_tokens import is_other, own_limits
from verl.utils.checkpoint.whole import refuse_pointers
from verl.utils.command_line import called_as
from verl.utils.dataset.tokenizer_checks import check_ids, check_tokenizer
from verl.utils.refusals import Findings

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Lengths:
    """Tokens of a prompt and of an answer, the settings that say so, and where there is one a command that prints
    fitting ones."""

    prompt: int
    response: int
    settings: str
    fitting: str | None = None

    @property
    def longest(self) -> int:
        return self.prompt + self.response


def _lengths(data: DataConfig, path: str) -> _Lengths:
    """Those of what a model in `path` reads with the student's tokenizer."""
    files = [data.train_files] if isinstance(data.train_files, str) else data.train_files
    fitting = f"{called_as('verl.data_tools.lengths')} --data {shlex.join(files)} --model {shlex.quote(path)}"
    settings = "data.max_prompt_length + data.max_response_length"
    return _Lengths(data.max_prompt_length, data.max_response_length, settings, fitting)


def _critics_lengths(
    config: Config, students: PreTrainedTokenizerBase | None, critics: PreTrainedTokenizerBase
) -> _Lengths:
    """Those of what the discriminator reads, whose tokenizer is `critics`; None: the student's is not known.

    Raises:
        ValueError: lengths are given that have no effect, as its tokenizer is the student's.
    """
    critic = config.critic
    if students is not None and is_other(critics, students):
        limits = own_limits(config)
        settings = (
            "critic.max_prompt_length + critic.max_response_length (in the tokens of the discriminator, which has a "
            "tokenizer of its own; null: twice those of data)"
        )
        return _Lengths(limits.prompt, limits.response, settings)
    given = [name for name in ("max_prompt_length", "max_response_length") if getattr(critic, name) is not None]
    if students is not None and given:
        raise ValueError(
            f"critic.{given[0]}={getattr(critic, given[0])} is for a discriminator with a tokenizer of its own, and "
            f"that in {critic.model.path} has the student's: leave it out, data.{given[0]} says it"
        )
    return _lengths(config.data, critic.model.path)


def _tokenizer_of(model: ModelConfig) -> PreTrainedTokenizerBase:
    refuse_pointers(find_tokenizer(model.tokenizer_path or model.path))
    tokenizer = load_tokenizer(model.tokenizer_path or model.path, model.trust_remote_code)
    check_ids(tokenizer)
    return tokenizer


def _look_at(
    model: ModelConfig,
    kind: Kind,
    key: str,
    lengths: _Lengths,
    tokenizer: PreTrainedTokenizerBase,
    sequence_parallel_size: int,
) -> None:
    """Check all that a model's folder tells about its use for rows of these lengths in its tokenizer's tokens, which so
    many ranks share."""
    # The rank that reads the weights compares the contents of a copy in memory itself.
    check_files(model.path, contents=not model.use_shm)
    if kind == "policy":
        refuse_discriminator(model.path)
        refuse_discriminator(base_of(model.path))
    else:
        check_labels(model.path)
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    try:
        _check_context(config, lengths)
        check_shared_heads(config, sequence_parallel_size)
        _check_vocabulary(config, tokenizer)
        model_class = find_class(config, kind, model.trust_remote_code)
        check_class(ANSWER_MODELS[kind], model_class, config, model.use_remove_padding, lengths.longest)
        if model.use_remove_padding:
            _say_costs(model, kind, key, config)
        if kind == "policy":
            check_head(model.path, config, model.trust_remote_code)
        _check_adapters(model, kind, key, config)
    except ValueError as error:
        raise ValueError(f"{key}.path={model.path}: {error}") from error


def _say_costs(model: ModelConfig, kind: Kind, key: str, config: PretrainedConfig) -> None:
    with torch.device("meta"):
        hf = empty_model(config, kind, model.trust_remote_code)
    for cost in costs_beside_packing(hf):
        logger.info("%s.path=%s: %s", key, model.path, cost)


def _check_adapters(model: ModelConfig, kind: Kind, key: str, config: PretrainedConfig) -> None:
    """The adapters that the run trains, if it does, suit the model, those of a folder to the last tensor, and are what
    their merged weights compute."""
    folder = find_model(model.path).adapter
    adapters = adapters_of(model, folder, key)
    if adapters is None:
        return

    in_4bit = base_in_4bit(model, folder, key)

    def adapted(wanted: LoraConfig) -> PreTrainedModel:
        with torch.device("meta"):
            hf = empty_model(config, kind, model.trust_remote_code)
            if in_4bit:
                linear_layers(hf)
            add_adapters(hf, wanted)
        return hf

    hf = adapted(adapters)
    if folder is not None:
        load_adapters(hf, folder)
        if model.lora_rank:
            _refuse_other_layers(adapted_layers(hf), adapted_layers(adapted(fresh_adapters(model))), key)
        logger.info("%s goes on training the adapters in %s, of rank %d", key, model.path, adapters.r)
    check_merging(type(hf), config, adapters)


def _refuse_other_layers(theirs: Iterable[str], wanted: Iterable[str], key: str) -> None:
    """ValueError if the adapters of a folder are beside other layers than the settings name."""
    theirs, wanted = set(theirs), set(wanted)
    if theirs != wanted:
        said = [
            f"{name} has {'one' if name in theirs else 'none'}, and should have {'one' if name in wanted else 'none'}"
            for name in sorted(theirs ^ wanted)[:2]
        ]
        raise ValueError(
            f"its adapters are beside other layers than {key}.target_modules and exclude_modules say, "
            f"{len(theirs ^ wanted)} of them ({'; '.join(said)}): leave {key}.lora_rank out, and those of the folder "
            "count; or merge them first"
        )


def _check_reference(config: Config) -> None:
    """With adapters the reference is the actor itself."""
    group = config.actor_rollout_ref
    if not config.use_reference or not trains_adapters(group.model):
        return
    if group.ref.fsdp_config.dtype != group.actor.fsdp_config.dtype:
        raise ValueError(
            f"actor_rollout_ref.ref.fsdp_config.dtype={group.ref.fsdp_config.dtype}, and where adapters are trained "
            f"the reference is the actor without them, which computes in {group.actor.fsdp_config.dtype}: leave it out"
        )


def _check_shared_base(config: Config) -> None:
    """Say whether student and discriminator, where both have adapters, share their base; ValueError if they are to and
    cannot."""
    policy, critic = config.actor_rollout_ref, config.critic
    if shares_base(policy, critic):
        logger.info("student and discriminator share the frozen weights of %s", base_of(policy.model.path))
    elif critic.model.share_base is None and trains_adapters(policy.model) and trains_adapters(critic.model):
        logger.info(
            "student and discriminator each have frozen weights of their own: %s", why_not_shared(policy, critic)
        )


def _check_context(config: PretrainedConfig, lengths: _Lengths) -> None:
    context = context_length(config)
    if context is not None and lengths.longest > context:
        raise ValueError(
            f"{lengths.settings} = {lengths.longest} is above max_position_embeddings={context}, the "
            "model's context: shorten them, or raise override_config.max_position_embeddings of a model with rotary "
            "positions that is to work beyond it"
            + (f". Values that fit the data: {lengths.fitting}" if lengths.fitting else "")
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


def check_models(config: Config) -> PreTrainedTokenizerBase:
    """Check the student and, if there is one, the discriminator; returns the student's tokenizer.

    Raises:
        FileNotFoundError: a folder holds no model.
        ValueError: a folder is not whole, or the student's holds a discriminator; a model's values would be wrong (see
            `check_class`), its context is shorter than a row, its heads cannot be shared by as many ranks as share a
            sequence, or it has no embedding for a token; a tokenizer makes
            other ids than its tokenizer.json, or the discriminator's is none that it can read text with; or GAD starts
            without a warmed-up discriminator.
    """
    findings, tokenizer, other = Findings(), None, None
    with findings.gathered():
        model = config.actor_rollout_ref.model
        tokenizer = _tokenizer_of(model)
        shards = config.actor_rollout_ref.actor.ulysses_sequence_parallel_size
        _look_at(model, "policy", "actor_rollout_ref.model", _lengths(config.data, model.path), tokenizer, shards)
    with findings.gathered():
        if config.use_critic:
            model, other = config.critic.model, _tokenizer_of(config.critic.model)
            lengths, shards = _critics_lengths(config, tokenizer, other), config.critic.ulysses_sequence_parallel_size
            _look_at(model, "score", "critic.model", lengths, other, shards)
    if config.use_critic and config.critic.model.path == config.actor_rollout_ref.model.path:
        _tell_once(findings)
    findings.tell()
    _check_reference(config)
    if config.use_critic:
        _check_discriminator(config, tokenizer, other)
        _check_shared_base(config)
    return tokenizer


def _tell_once(findings: Findings) -> None:
    """Of what was found of one folder, as the student's and as the discriminator's: the same reason once."""
    findings.errors = list({str(error.__cause__ or error): error for error in reversed(findings.errors)}.values())[::-1]


def _check_own_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """The discriminator's tokenizer, which is not the student's, can read text for it."""
    model = config.critic.model
    check_tokenizer(tokenizer)
    read = load_config(model.path, "score", model.override_config, model.trust_remote_code)
    size, last = read.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if last >= size:
        # Which tokens the student's answers will have is not known.
        text = repr(tokenizer.convert_ids_to_tokens(last))
        raise ValueError(f"critic.model.path={model.path}: {_without_embedding(f'token {text}', last, size)}")


def _check_students_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """The discriminator, which is given the student's tokens, has an embedding for each that the student can write."""
    size, students = (
        load_config(model.path, kind, model.override_config, model.trust_remote_code).get_text_config().vocab_size
        for model, kind in ((config.critic.model, "score"), (config.actor_rollout_ref.model, "policy"))
    )
    last = min(max(tokenizer.get_vocab().values()), students - 1)
    if last >= size:
        text = repr(tokenizer.convert_ids_to_tokens(last))
        path = config.critic.model.path
        raise ValueError(
            f"critic.model.path={path}: {_without_embedding(f'token {text} of the student', last, size)}; where it has "
            f"a tokenizer of its own, set critic.model.tokenizer_path={path}"
        )


def _warn_of_students_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a discriminator that is given the student's `tokenizer`, as `tokenizer_path` is handed on, and has
    another beside it: it may be of another family."""
    model, students = config.critic.model, config.actor_rollout_ref.model
    if model.tokenizer_path is None or model.tokenizer_path != students.tokenizer_path or model.path == students.path:
        return
    try:
        own = load_tokenizer(model.path, model.trust_remote_code)
    except (FileNotFoundError, ValueError):
        return
    if own.get_vocab() != tokenizer.get_vocab():
        logger.warning(
            "critic.model.tokenizer_path is the student's, %s, and the discriminator in %s has another vocabulary "
            "beside it: if it is of another family, set critic.model.tokenizer_path=%s, so that it reads with its own",
            model.tokenizer_path, model.path, model.path,
        )  # fmt: skip


def _check_discriminator(config: Config, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """The discriminator, whose tokenizer is `other`, can read what the student writes and has learned where it has
    to."""
    path = config.critic.model.path
    _warn_of_students_tokenizer(config, other)
    if is_other(other, tokenizer):
        _check_own_tokenizer(config, other)
    else:
        _check_students_tokens(config, tokenizer)
    rewards = not config.trainer.warmup_use_sft and not config.trainer.val_only
    if rewards and config.trainer.critic_warmup == 0 and not is_discriminator(path):
        raise ValueError(
            f"{path} is a language model, and an untrained discriminator would reward noise: pass a warmed-up critic "
            "(critic.model.path, --reward_model), or let it learn first with trainer.critic_warmup=N steps or auto"
        )
    if not is_discriminator(path):
        logger.info("%s is a language model: the discriminator starts from it with a fresh score head", path)
    _warn_of_other_scoring(config)


def _is_rewarding(path: str) -> bool:
    """Whether a folder holds a reward model, or adapters that make one."""
    adapter = find_model(path).adapter
    return is_reward_model(config_entries(path)) or (adapter is not None and adapter.rewards)


def _warn_of_other_scoring(config: Config) -> None:
    """Warn of a warmed-up discriminator that was trained with another pooling or EOS setting: its scores will mean
    something else at first."""
    settings = config.critic.discriminator
    pooling = settings.pooling or get_discriminator_loss_fn(settings.loss).pooling
    now = {"pooling": pooling, "exclude_eos": settings.exclude_eos}
    model = config.critic.model
    usual = {"pooling": POOLING, "exclude_eos": False} if _is_rewarding(model.path) else now
    trained = getattr(load_config(model.path, "score", None, model.trust_remote_code), "discriminator", usual)
    differing = [f"{key}={trained[key]}" for key in now if trained[key] != now[key]]
    if differing:
        logger.warning(
            "the discriminator in %s was trained with critic.discriminator.%s, and this run uses %s: its scores will "
            "mean something else at first",
            model.path, ", ".join(differing), ", ".join(f"{key}={value}" for key, value in now.items()),
        )  # fmt: skip
