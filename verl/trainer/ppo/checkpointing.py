"""Saving and resuming a run: who writes what, and in which order."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from verl.config.run import TrainerConfig
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.best import BestState
from verl.trainer.ppo.origin import Origin
from verl.utils.checkpoint.best_link import behind_best, point_best
from verl.utils.checkpoint.checkpoint_manager import (
    mark_only_as_best,
    prune_checkpoints,
    publish_checkpoint,
    remove_former_bests,
    seal_checkpoint,
    start_checkpoint,
    step_of,
    verify_checkpoint,
)
from verl.utils.checkpoint.recovery import newest_whole, refuse_damaged
from verl.utils.checkpoint.room import bytes_in, check_room, explain_full_disk
from verl.utils.stalls import doing

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
    best: BestState | None = None

    @classmethod
    def read(cls, file: Path) -> RunState:
        """As it was saved; what an older trainer did not know of has its default."""
        fields = json.loads(file.read_text())
        best = fields.pop("best", None)
        return cls(**fields, best=None if best is None else BestState(**best))


class Kept(Protocol):
    """A part of the run beside the models that keeps a file in checkpoints."""

    def save(self, file: Path) -> None: ...

    def load(self, file: Path) -> None: ...


class Checkpoints:
    """The checkpoints of one run, under `trainer.default_local_dir`.

    Args:
        actor, critic: the workers whose models are saved.
        files: what else is saved, by the name of its file.
        origin: what the run began with; None: checkpoints keep nothing of it.
        size: bytes of a checkpoint, as far as is known before there is one.
    """

    def __init__(
        self,
        config: TrainerConfig,
        actor: WorkerGroup,
        critic: WorkerGroup | None,
        files: Mapping[str, Kept],
        origin: Origin | None = None,
        size: int = 0,
    ):
        self.config = config
        self.origin = origin
        self.parts = {"actor": actor} if critic is None else {"actor": actor, "critic": critic}
        self.files = files
        self.root = run_folder(config)
        # Of the newest checkpoint in `root` that this run wrote or began with.
        self.saved_step: int | None = None
        # The newest checkpoint's step when the older ones were pruned.
        self.pruned_step: int | None = None
        # Bytes of the next one: as many as the last one's.
        self.size = size

    def warn_of_little_room(self) -> None:
        """Say it at the start if there is no room for a checkpoint yet."""
        try:
            check_room(self.root, self.size)
        except OSError as error:
            logger.warning("as it is, nothing can be saved: %s", error.strerror)

    def write(self, state: RunState, only_as_best: bool = False) -> None:
        """Write the folder of `global_step_N`, all but its name, which `publish` gives it.

        `only_as_best`: the checkpoint is not one of those that are due anyway.

        Raises:
            OSError: there is no room for it; seen before anything is written, as far as it can be.
        """
        check_room(self.root, self.size)
        folder = start_checkpoint(self.root, state.global_step)
        with explain_full_disk(folder), doing(f"writing {folder}"):
            self._write(folder, state, only_as_best)
        self.size = bytes_in(folder)

    def _write(self, folder: Path, state: RunState, only_as_best: bool) -> None:
        for name, group in self.parts.items():
            group.save_checkpoint(str(folder / name))
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))
        if self.origin is not None:
            self.origin.write(folder)
        if only_as_best:
            mark_only_as_best(folder)
        for name, kept in self.files.items():
            kept.save(folder / name)
        seal_checkpoint(folder, tuple(self.parts))

    def publish(self, state: RunState) -> None:
        """Let what was written for this state exist as `global_step_N`.

        Then `best` becomes what the state says, and only then what it was may go. Others go with `prune`.
        """
        folder = self.root / f"global_step_{state.global_step}.tmp"
        with explain_full_disk(folder), doing(f"completing {folder}"):
            final = publish_checkpoint(folder)
        self.saved_step = state.global_step
        if state.best is not None and state.best.step is not None:
            self.point_best(state.best.step)
        remove_former_bests(self.root, state.global_step)
        logger.info("saved %s", final)

    def prune(self) -> None:
        """Remove what is not to be kept beside the newest checkpoint; to be called when that has proven to be good."""
        if self.saved_step == self.pruned_step:
            return
        prune_checkpoints(self.root, "actor", self.config.max_actor_ckpt_to_keep, self.saved_step)
        prune_checkpoints(self.root, "critic", self.config.max_critic_ckpt_to_keep, self.saved_step)
        self.pruned_step = self.saved_step

    def point_best(self, step: int) -> bool:
        """Let `best` name the checkpoint of this step, if it is there; whether it is."""
        there = (self.root / f"global_step_{step}").is_dir()
        if there:
            point_best(self.root, step)
        return there

    def restore_best(self, best: BestState) -> None:
        """Let `best` name what it did when the checkpoint resumed from was written; say so if that is gone."""
        if best.step is not None and not self.point_best(best.step):
            logger.warning(
                "the best so far, of step %d, is not in %s: best/ stays as it is until there is a better one",
                best.step, self.root,
            )  # fmt: skip

    def load(self, folder: Path) -> RunState:
        """Restore models and files from a checkpoint; returns where the run was.

        Raises:
            FileNotFoundError, ValueError: it is incomplete or damaged.
        """
        step_of(folder)
        verify_checkpoint(folder)
        for name, group in self.parts.items():
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"cannot resume from {folder}: it has no {name}; was it another stage's?")
            group.load_checkpoint(str(folder / name))
        state = RunState.read(folder / STATE_FILE)
        for name, kept in self.files.items():
            kept.load(folder / name)
        logger.info("resumed from %s: %d steps are done", folder, state.global_step)
        if folder.parent.resolve() == self.root.resolve():
            self.saved_step = state.global_step
        return state

    def find(self) -> Path | None:
        """See `find_checkpoint`."""
        return find_checkpoint(self.config, self.parts)


def run_folder(config: TrainerConfig) -> Path:
    """Where checkpoints go, absolute: workers may run in another folder than the driver."""
    return Path(config.default_local_dir).expanduser().absolute()


def find_checkpoint(config: TrainerConfig, parts: Collection[str] = ("actor",)) -> Path | None:
    """The checkpoint that `trainer.resume_mode` asks for, whole; None if training starts afresh.

    With `auto` it is the newest that is whole, and damaged ones on the way to it are set aside (`newest_whole`).

    Raises:
        FileNotFoundError, ValueError: it is not there or damaged, or it cannot be told which one it is.
    """
    if config.resume_mode == "disable":
        return None
    if config.resume_mode == "auto":
        return newest_whole(run_folder(config), parts)
    folder = Path(config.resume_from_path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"trainer.resume_from_path={folder} does not exist")
    folder = behind_best(folder)
    refuse_damaged(folder)
    return folder
