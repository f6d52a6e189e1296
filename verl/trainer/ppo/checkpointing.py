"""Saving and resuming a run: who writes what, and in which order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.single_controller.base import WorkerGroup
from verl.trainer.config.schema import TrainerConfig
from verl.utils.checkpoint.checkpoint_manager import (
    commit_checkpoint,
    find_latest_ckpt_path,
    prune_checkpoints,
    start_checkpoint,
    step_of,
    verify_checkpoint,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class RunState:
    """What the loop has to know to go on. Shuffling and sampling are functions of it, so no random state is kept."""

    global_step: int
    samples_seen: int
    kl_coef: float
    # The discriminator's smoothed accuracy, and how far its head start is.
    d_acc: float | None = None
    first_actor_step: int | None = None
    head_start_held: int = 0


class Checkpoints:
    """The checkpoints of one run, under `trainer.default_local_dir`."""

    def __init__(self, config: TrainerConfig, actor: WorkerGroup, critic: WorkerGroup | None):
        self.config = config
        self.parts = {"actor": actor} if critic is None else {"actor": actor, "critic": critic}
        # Workers may run in another folder than the driver.
        self.root = Path(config.default_local_dir).expanduser().absolute()

    @contextmanager
    def save(self, state: RunState) -> Iterator[Path]:
        """Write `global_step_N`; it exists under that name only once it is complete.

        Yields the folder to write other files of the run into, before it is completed.
        """
        folder = start_checkpoint(self.root, state.global_step)
        for name, group in self.parts.items():
            group.save_checkpoint(str(folder / name))
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))
        yield folder
        final = commit_checkpoint(folder)
        prune_checkpoints(self.root, "actor", self.config.max_actor_ckpt_to_keep, state.global_step)
        prune_checkpoints(self.root, "critic", self.config.max_critic_ckpt_to_keep, state.global_step)
        logger.info("saved %s", final)

    def load(self, folder: Path) -> RunState:
        """Restore the models from a checkpoint; returns where the run was.

        Raises:
            FileNotFoundError, ValueError: it is incomplete or damaged.
        """
        step_of(folder)
        verify_checkpoint(folder)
        for name, group in self.parts.items():
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"cannot resume from {folder}: it has no {name}; was it another stage's?")
            group.load_checkpoint(str(folder / name))
        state = RunState(**json.loads((folder / STATE_FILE).read_text()))
        logger.info("resumed from %s: %d steps are done", folder, state.global_step)
        return state

    def find(self) -> Path | None:
        """The checkpoint that `trainer.resume_mode` asks for; None if training starts afresh.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.config.resume_mode == "disable":
            return None
        if self.config.resume_mode == "resume_path":
            folder = Path(self.config.resume_from_path).expanduser().absolute()
            if not folder.is_dir():
                raise FileNotFoundError(f"trainer.resume_from_path={folder} does not exist")
            return folder
        latest = find_latest_ckpt_path(self.root)
        return None if latest is None else Path(latest)
