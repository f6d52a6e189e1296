"""Saving and resuming a run: who writes what, and in which order."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from verl.config.run import TrainerConfig
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.best import BestState
from verl.trainer.ppo.folders import named_checkpoint, run_folder
from verl.trainer.ppo.origin import Origin
from verl.utils.background import Background
from verl.utils.checkpoint.best_link import behind_best, point_best
from verl.utils.checkpoint.checkpoint_manager import (
    STATE_FILE,
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
from verl.utils.checkpoint.sharded import check_all_are_seen
from verl.utils.checkpoint.whole import FSDP_CONFIG, how_it_was_trained
from verl.utils.stalls import doing

logger = logging.getLogger(__name__)

# Between two looks at what is being written in the background.
LOOK_S = 0.2
WRITING = "writing a checkpoint in the background"
# After an error, ranks that do not answer for so long are not waited for.
SILENCE_S = 30.0


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

    With `trainer.async_save` the models are copied to host memory, and all else about a checkpoint happens in the
    background, one at a time and in the same order. A failure there is raised by `settle` or `wait`.

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
        self._writing: Background | None = None
        # When the ranks were asked whether they have written, while they have not answered.
        self._asked: float | None = None
        self._given_up = False

    def reserve(self) -> None:
        """Let the workers take the host memory that background writing needs."""
        if self.config.async_save:
            for group in self.parts.values():
                group.reserve_for_checkpoints()

    def write(self, state: RunState, only_as_best: bool = False) -> None:
        """Write the folder of `global_step_N`, all but its name, which `publish` gives it; or only begin to, in the
        background, where what is written is the state at this moment. What was begun before is waited for.

        `only_as_best`: the checkpoint is not one of those that are due anyway.

        Raises:
            OSError: there is no room for it; seen before anything is written, as far as it can be.
        """
        self.wait()
        check_room(self.root, self.size)
        folder = start_checkpoint(self.root, state.global_step)
        with explain_full_disk(folder), doing(f"writing {folder}"):
            self._write(folder, state, only_as_best)
            if not self.config.async_save:
                self._seal(folder)

    def _write(self, folder: Path, state: RunState, only_as_best: bool) -> None:
        for name, group in self.parts.items():
            save = group.begin_checkpoint if self.config.async_save else group.save_checkpoint
            save(str(folder / name))
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))
        if self.origin is not None:
            self.origin.write(folder)
        if only_as_best:
            mark_only_as_best(folder)
        for name, kept in self.files.items():
            kept.save(folder / name)

    def _seal(self, folder: Path) -> None:
        seal_checkpoint(folder, tuple(self.parts))
        self.size = bytes_in(folder)

    def publish(self, state: RunState) -> None:
        """Let what was written for this state exist as `global_step_N`, in the background as soon as it is written.

        Then `best` becomes what the state says, and only then what it was may go. Others go with `prune`.
        """
        folder = self.root / f"global_step_{state.global_step}.tmp"
        if self.config.async_save:
            self._writing = Background(partial(self._finish_in_background, folder, state), f"saving {folder}")
        else:
            self._publish(folder, state)

    def _publish(self, folder: Path, state: RunState) -> None:
        with explain_full_disk(folder), doing(f"completing {folder}"):
            final = publish_checkpoint(folder)
        if state.best is not None and state.best.step is not None:
            self.point_best(state.best.step)
        remove_former_bests(self.root, state.global_step)
        self.saved_step = state.global_step
        logger.info("saved %s", final)

    # ------------------------------------------------------------ in the background

    def _finish_in_background(self, folder: Path, state: RunState) -> None:
        """All that `write` has left, once every rank has written its part."""
        start = time.monotonic()
        try:
            with explain_full_disk(folder):
                while not self._given_up and not self._all_written():
                    time.sleep(LOOK_S)
                if self._given_up:
                    return
                for name in self.parts:
                    check_all_are_seen(folder / name)
                self._seal(folder)
            self._publish(folder, state)
        except OSError as error:
            # Of a full disk, with the folder's name.
            if error.filename == str(folder):
                raise
            raise _not_written(folder, error) from error
        except Exception as error:
            raise _not_written(folder, error) from error
        logger.info("writing it took %.1f s in the background", time.monotonic() - start)

    def _all_written(self) -> bool:
        self._asked = time.monotonic()
        try:
            # Every group is asked, so that none keeps its error for the next checkpoint.
            return all([all(group.checkpoint_is_written()) for group in self.parts.values()])
        finally:
            self._asked = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._writing is not None and self._writing.at_work

    def settle(self) -> None:
        """See what has become of a checkpoint in the background. Raises what it failed of; returns if it goes on."""
        if not self.is_writing:
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is being written any more. Raises what the last one failed of, once."""
        if self._writing is not None:
            with doing(WRITING):
                self._writing.join()
            done, self._writing = self._writing, None
            done.wait()

    @contextmanager
    def all_written(self) -> Iterator[None]:
        """See that nothing is being written when the block is left.

        An error in the block is raised when the checkpoint is there that was being written, or cannot be any more. Only
        the end of a run at once, by a signal or a stall, leaves it half written.
        """
        try:
            yield
            self.wait()
        except Exception as error:
            self._wait_after(error)
            raise
        finally:
            # No rank is asked any more: whoever asks Ray after its end starts another one.
            self._given_up = True
            if self._writing is not None:
                self._writing.join(2 * LOOK_S)

    def _wait_after(self, error: Exception) -> None:
        """Return when nothing is being written any more, or the ranks do not say whether they have."""
        if self.is_writing:
            logger.error("%s: %s: the run ends when the last checkpoint is written", type(error).__name__, error)
        start = time.monotonic()
        with doing(WRITING):
            while self.is_writing:
                asked = self._asked
                if asked is not None and time.monotonic() - max(asked, start) > SILENCE_S:
                    logger.error("the checkpoint that was being written is not finished: its ranks do not answer")
                    return
                self._writing.join(LOOK_S)
        try:
            self.wait()
        except Exception as other:
            logger.error("%s", other)

    def prune(self) -> None:
        """Remove what is not to be kept beside the newest checkpoint; to be called when that has proven to be good.

        Nothing while one is being written: it is left to the next call.
        """
        if self._writing is not None or self.saved_step == self.pruned_step:
            return
        kept = {part: keep for part, keep in kept_of(self.config).items() if part in self.parts}
        gone = [name for part in kept for name in prune_checkpoints(self.root, part, kept[part], self.saved_step)]
        # Of one that is gone as a whole its parts need not be named.
        named = [name for name in gone if name == name.partition("/")[0] or name.partition("/")[0] not in gone]
        if named:
            logger.info("pruned %s: %s", ", ".join(named), kept_in_words(kept))
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
        self._warn_of_another_world(folder)
        state = RunState.read(folder / STATE_FILE)
        for name, kept in self.files.items():
            kept.load(folder / name)
        logger.info("resumed from %s: %d steps are done", folder, state.global_step)
        if folder.parent.resolve() == self.root.resolve():
            self.saved_step = state.global_step
        return state

    def _warn_of_another_world(self, folder: Path) -> None:
        """Say it if another number of ranks wrote the checkpoint, and what that changes."""
        how = folder / "actor" / FSDP_CONFIG
        if not how.is_file():
            return
        written, ranks = how_it_was_trained(how, "world_size", int), self.parts["actor"].world_size
        if written != ranks:
            logger.warning(
                "%s was written by %d ranks, and this run has %d: weights, optimizers, schedules, data and replay are "
                "the same; sums are rounded otherwise, and answers from here on are other draws, as each rank draws "
                "its own", folder, written, ranks,
            )  # fmt: skip

    def find(self) -> Path | None:
        """See `find_checkpoint`."""
        return find_checkpoint(self.config, self.parts)


def _not_written(folder: Path, error: Exception) -> RuntimeError:
    # A rank's error has its traceback in it, and the reason last.
    reason = (str(error).strip() or repr(error)).splitlines()[-1]
    return RuntimeError(f"{folder} could not be written in the background, so it is no checkpoint: {reason}")


def kept_of(config: TrainerConfig) -> dict[str, int | None]:
    """How many of the last checkpoints keep each part; None: all."""
    return {"actor": config.max_actor_ckpt_to_keep, "critic": config.max_critic_ckpt_to_keep}


def kept_in_words(kept: Mapping[str, int | None]) -> str:
    """What is kept, with the settings that say so."""
    words = {part: "all" if keep is None else f"the last {keep}" for part, keep in kept.items()}
    same = len(set(words.values())) == 1
    shown = next(iter(words.values())) if same else ", ".join(f"{part}: {word}" for part, word in words.items())
    return f"kept are {shown} ({', '.join(f'trainer.max_{part}_ckpt_to_keep' for part in kept)}) and the best"


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
    folder = behind_best(named_checkpoint(config))
    refuse_damaged(folder)
    return folder
