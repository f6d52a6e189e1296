"""From settings that have been looked at to a trainer whose models, data and checkpoint have been too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from verl.batch import Prompts
from verl.models.loading import quiet_transformers
from verl.trainer.config import Config
from verl.trainer.looking_over import look_at
from verl.trainer.ppo.checkpointing import find_checkpoint
from verl.trainer.ppo.disk import check_disk
from verl.trainer.ppo.ending import nothing_left, say_end
from verl.trainer.ppo.origin import Origin, check_same_run
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.trainer.ppo.profiled_steps import check_profile_steps
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import ResourcePoolManager, Role
from verl.utils.checkpoint.checkpoint_manager import step_of
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.refusals import Findings
from verl.utils.run_log import phase


def resumed_from(config: Config) -> Path | None:
    """The checkpoint that this run will go on from; None if it begins afresh."""
    return find_checkpoint(config.trainer, ("actor", "critic") if config.use_critic else ("actor",))


def check_resume(config: Config, rows: int, resumed: Path | None) -> Origin:
    """The models and data that this run begins with. Refuses to resume a run that began with others
    (`check_same_run`)."""
    now = Origin.of(config, rows)
    if resumed is not None:
        check_same_run(resumed, now, config)
    return now


def checked_run(
    config: Config,
    findings: Findings,
    trainer_class: type[RayPPOTrainer],
    worker_classes: Mapping[Role, type],
    pools: ResourcePoolManager,
) -> tuple[RayPPOTrainer, Path | None] | None:
    """The trainer, without its workers, and the checkpoint that it goes on from; None, which is said, if nothing is
    left to train.

    Args:
        findings: what is known to be wrong already, to be told with the rest.
    """
    quiet_transformers()
    tokenizer, train, val = look_at(config, findings)
    own_tokens = OwnTokens.of(config, tokenizer)
    if own_tokens is not None:
        with phase("looking at the data as the discriminator reads it"):
            train, val = (None if rows is None else own_tokens.with_prompts(rows) for rows in (train, val))
    # Half of a row's bytes are columns that users of verl's names know and nothing here reads.
    collate = partial(collate_fn, columns=Prompts.names())
    runner = trainer_class(config, tokenizer, worker_classes, pools, train, val, collate)
    resumed = resumed_from(config)
    runner.origin, runner.own_tokens = check_resume(config, len(train), resumed), own_tokens
    over = nothing_left(config, runner.total_steps, resumed)
    if over is not None:
        say_end(config, over)
        return None
    check_profile_steps(config, runner.total_steps, 0 if resumed is None else step_of(resumed))
    check_disk(config, runner.total_steps, resumed)
    return runner, resumed
