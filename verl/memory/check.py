"""The memory estimate of a run from its configuration, before models are built."""

from __future__ import annotations

import logging

from verl.config import ModelConfig
from verl.config.run import Config
from verl.memory.estimate import RunSettings, check_memory
from verl.memory.small import larger_micro_batches
from verl.models.adapters import base_in_4bit
from verl.models.finding import find_model
from verl.models.loading import Kind, load_config
from verl.models.shape import ModelShape
from verl.models.sharding import trained_adapters
from verl.models.shared_base import shares_base

logger = logging.getLogger(__name__)


def check_run_memory(config: Config, sizes: tuple[int, int] | None) -> None:
    """Log the estimate, and warn where it does not fit (see `check_memory`, which raises where it cannot); say where a
    small model has room for larger micro-batches.

    Args:
        sizes: bytes of one GPU and of one machine's memory; None on CPU, where there is no estimate.
    """
    if sizes is None:
        return
    run = run_settings(config, config.use_critic and shares_base(config.actor_rollout_ref, config.critic))
    shapes = (
        _shape(config.actor_rollout_ref.model, "policy"),
        None if run.critic is None else _shape(run.critic.model, "score"),
    )
    check_memory(run, *shapes, *sizes)
    if larger := larger_micro_batches(run, *shapes, sizes[0])[0]:
        logger.info("Speed: a small model's GPU waits for the host between micro-batches, and larger ones fit: %s",
                    ", ".join(map(str, larger)))  # fmt: skip


def run_settings(config: Config, share_base: bool = False) -> RunSettings:
    """The settings of a run that determine its memory use.

    Args:
        share_base: whether the discriminator has the student's frozen weights (`shares_base`), which only the models'
            folders tell.
    """
    return RunSettings(
        config.actor_rollout_ref,
        config.critic if config.use_critic else None,
        config.use_reference,
        config.trainer.ranks,
        config.trainer.n_gpus_per_node,
        pairs=config.soda.enable,
        async_save=config.trainer.async_save,
        share_base=share_base,
        generates=config.generates and not config.rollout_ranks,
    )


def _shape(model: ModelConfig, kind: Kind) -> ModelShape:
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    in_4bit = base_in_4bit(model, find_model(model.path).adapter)
    return ModelShape.of(config, kind, model.trust_remote_code, trained_adapters(model), in_4bit)
