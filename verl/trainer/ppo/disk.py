"""What a run's checkpoints will take of the disk: said before it starts, and refused where not even one fits."""

from __future__ import annotations

import logging
from pathlib import Path

from verl.config import ModelConfig
from verl.config.run import Config
from verl.memory.estimate import MASTER, MOMENTS
from verl.models.loading import Kind, load_config
from verl.models.shape import count_parameters
from verl.models.sharding import trained_adapters
from verl.trainer.ppo.checkpointing import kept_in_words, kept_of
from verl.trainer.ppo.folders import run_folder
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in, not_to_be_kept, step_of
from verl.utils.checkpoint.room import Part, amount, bytes_in, check_room, free_in, most_on_disk

logger = logging.getLogger(__name__)

BYTES_PER_PARAMETER = MASTER + MOMENTS


def check_disk(config: Config, total_steps: int, resumed: Path | None) -> None:
    """Say what the checkpoints of a run will take beside what is free, and which earlier ones it will prune.

    Args:
        total_steps: of the whole run.
        resumed: the checkpoint that it goes on from.

    Raises:
        OSError: its first checkpoint will not fit.
    """
    root, done = run_folder(config.trainer), 0 if resumed is None else step_of(resumed)
    parts = checkpoint_parts(config)
    one, to_come = sum(part.size for part in parts.values()), checkpoints_to_come(config, done, total_steps)
    if config.trainer.val_only or to_come == 0:
        return
    root.mkdir(parents=True, exist_ok=True)
    # A run that begins afresh replaces and prunes what lies in its way, too late for its first checkpoint.
    goes_on = resumed is not None and resumed.parent.resolve() == root.resolve()
    there = [folder for folder in checkpoints_in(root) if goes_on and step_of(folder) <= done]
    goes = [folder for name, part in parts.items() for folder in not_to_be_kept(root, name, part.keep, done)]
    freed = sum(map(bytes_in, goes)) if there else 0
    most = most_on_disk(parts.values(), len(there), to_come, config.trainer.best_metric is not None)
    free = free_in(root)
    kept = kept_in_words({name: part.keep for name, part in parts.items()})
    logger.info(
        "checkpoints take %s each (%d bytes a parameter), up to %s while one is written (%s); %s has %s free",
        amount(one), BYTES_PER_PARAMETER, amount(most), kept, root, amount(free),
    )  # fmt: skip
    if freed:
        names = sorted({folder.parent for folder in goes if folder.is_dir()}, key=step_of)
        logger.warning(
            "older checkpoints in %s go after the next step: %s (%s)",
            root, ", ".join(folder.name for folder in names), kept,
        )  # fmt: skip
    check_room(root, one, freed)
    if most > free + sum(map(bytes_in, there)):
        logger.warning(
            "there is no room for all of them: let fewer be kept, or put trainer.default_local_dir elsewhere; the "
            "run ends when one does not fit"
        )


def checkpoint_parts(config: Config) -> dict[str, Part]:
    """The models in the run's checkpoints, `actor` and `critic`."""
    kinds: dict[str, tuple[ModelConfig, Kind]] = {"actor": (config.actor_rollout_ref.model, "policy")}
    if config.use_critic:
        kinds["critic"] = (config.critic.model, "score")
    return {
        name: Part(BYTES_PER_PARAMETER * _parameters(model, kind), kept_of(config.trainer)[name])
        for name, (model, kind) in kinds.items()
    }


def merged_parameters(config: Config) -> int:
    """The parameters of the run's student, merged: more than its checkpoints hold where adapters are trained."""
    model = config.actor_rollout_ref.model
    hf = load_config(model.path, "policy", model.override_config, model.trust_remote_code)
    return count_parameters(hf, "policy", model.trust_remote_code)


def _parameters(model: ModelConfig, kind: Kind) -> int:
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    return count_parameters(config, kind, model.trust_remote_code, trained_adapters(model))


def checkpoints_to_come(config: Config, done: int, total_steps: int) -> int:
    """How many a run that has made so many steps will save, bests left out: every `save_freq` steps and after the
    last one."""
    frequency = config.trainer.save_freq
    if done >= total_steps:
        return 0
    if frequency <= 0:
        return 1
    return total_steps // frequency - done // frequency + (total_steps % frequency > 0)
