"""The origin of a run, its stage, models and data, kept in its checkpoints: a run that resumes goes on with their
weights and counters, whatever model, stage or data its own settings name.

Models and data are known by their content, so that a folder may be moved or renamed between two parts of a run; those
of the hub by their commit as well.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.config.run import Config
from verl.models.content import Content, content_of, content_of_model, digest_of
from verl.trainer.ppo.rejected import refuse_another_stage
from verl.utils.checkpoint.checkpoint_manager import ORIGIN_FILE, REJECTED_FILE
from verl.utils.checkpoint.checksums import checksums_of
from verl.utils.dataset.rl_dataset import find_files

logger = logging.getLogger(__name__)

# What a run that resumes may change, in words.
FREE = (
    "learning rates and schedules (*.optim.*), losses and their coefficients, micro-batches and token budgets, nnodes, "
    "n_gpus_per_node, total_training_steps, total_epochs, and when and where it saves, validates and logs"
)


@dataclass(frozen=True)
class Origin:
    """A run's stage, models, and rows with their order."""

    stage: str
    actor: Content
    critic: Content | None
    data: Content
    rows: int
    order: str
    # None in a checkpoint of an older trainer.
    batch_size: int | None = None
    seed: int | None = None
    turns: str = "none"

    @classmethod
    def of(cls, config: Config, rows: int) -> Origin:
        """The origin of a run with these settings; `rows` is the size of its training set."""
        files, data = find_files(config.data.train_files), config.data
        sums = [checksums_of(file.absolute().parent, [file.name])[file.name] for file in files]
        return cls(
            stage=config.stage,
            actor=content_of_model(config.actor_rollout_ref.model.path),
            critic=content_of_model(config.critic.model.path) if config.use_critic else None,
            data=content_of(files, digest_of(sums)),
            rows=rows,
            order=f"shuffled with seed {data.seed}" if data.shuffle else "as in the files",
            batch_size=data.train_batch_size,
            seed=data.seed,
            turns=data.turns,
        )

    def write(self, folder: Path) -> None:
        """Keep it in a checkpoint."""
        (folder / ORIGIN_FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """That of a checkpoint; None of one by an older trainer."""
        if not (folder / ORIGIN_FILE).is_file():
            return None
        fields: dict[str, Any] = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        contents = {name: Content(**fields[name]) for name in ("actor", "critic", "data") if fields[name] is not None}
        return cls(**fields | contents)

    def differences(self, now: Origin) -> list[str]:
        """The differences to the origin `now`, each in words."""
        found = [f"stage {self.stage}, now {now.stage}"] if self.stage != now.stage else []
        pairs = {
            "actor_rollout_ref.model.path": (self.actor, now.actor),
            "critic.model.path": (self.critic, now.critic),
            "data.train_files": (self.data, now.data),
        }
        for key, (before, after) in pairs.items():
            if before is not None and after is not None and before.differs(after):
                moved = f", now {after.where}" if after.where != before.where else " has another content now"
                found.append(f"{key}={before.where}{moved}")
        if self.turns != now.turns:
            found.append(f"data.turns={self.turns}, now {now.turns}")
        elif self.data.digest == now.data.digest and self.rows != now.rows:
            found.append(f"{self.rows} rows of the training data, now {now.rows}")
        if self.order != now.order:
            found.append(f"rows {self.order}, now {now.order}")
        return found

    def doubts(self, now: Origin) -> list[str]:
        """The differences with which a run may go on, though it is not the one that it would have been."""
        found = []
        if self.batch_size not in (None, now.batch_size):
            found.append(
                f"data.train_batch_size={self.batch_size}, now {now.batch_size}: the rows go on where they were, and "
                "from here on a step, by which schedules and all frequencies count, is of another size"
            )
        if self.seed not in (None, now.seed) and self.order == now.order:
            found.append(f"data.seed={self.seed}, now {now.seed}: answers are other draws, rows keep their order")
        return found


def check_same_run(folder: Path, now: Origin, config: Config) -> None:
    """Look at the checkpoint that a run is about to resume from.

    Raises:
        FileNotFoundError: it lacks what the stage needs.
        ValueError: it was found, not named (`trainer.resume_mode=auto`), and is of a run that began with something
            else.
    """
    if config.use_critic and not (folder / "critic").is_dir():
        raise FileNotFoundError(f"cannot resume from {folder}: it has no critic; was it another stage's?")
    if config.soda.enable:
        refuse_another_stage(folder / REJECTED_FILE)
    before = Origin.read(folder)
    for doubt in [] if before is None else before.doubts(now):
        logger.warning("%s is of a run that began with %s. What may change as you like: %s", folder, doubt, FREE)
    differences = [] if before is None else before.differences(now)
    if not differences:
        return
    if config.trainer.resume_mode == "resume_path" or config.trainer.val_only:
        logger.warning("%s is of a run that began otherwise: %s", folder, "; ".join(differences))
        return
    raise ValueError(
        f"{folder} is of a run that began otherwise: {'; '.join(differences)}. Going on from it would keep its weights "
        "and its place in the data. Give this run another trainer.experiment_name (--exp_name), or begin afresh here "
        "with trainer.resume_mode=disable; if it is meant, trainer.resume_mode=resume_path "
        f"trainer.resume_from_path={folder}. What may change as you like: {FREE}"
    )
