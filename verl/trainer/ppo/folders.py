"""The folders of a run: its own, and those that it may go on from."""

from __future__ import annotations

from pathlib import Path

from verl.config.run import TrainerConfig
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in


def run_folder(config: TrainerConfig) -> Path:
    """Where checkpoints go, absolute: workers may run in another folder than the driver."""
    return Path(config.default_local_dir).expanduser().absolute()


def may_resume(config: TrainerConfig) -> bool:
    """Whether there are checkpoints that training may go on from; nothing is read of them."""
    return config.resume_mode == "resume_path" or (
        config.resume_mode == "auto" and bool(checkpoints_in(run_folder(config)))
    )


def may_resume_critic(config: TrainerConfig) -> bool:
    """Whether a checkpoint that training may go on from has a discriminator; nothing is read of them."""
    if config.resume_mode == "disable":
        return False
    folders = checkpoints_in(run_folder(config)) if config.resume_mode == "auto" else [named_checkpoint(config)]
    return any((folder / "critic").is_dir() for folder in folders)


def named_checkpoint(config: TrainerConfig) -> Path:
    """The folder of `trainer.resume_from_path`, not looked into. FileNotFoundError if it is not there."""
    folder = Path(config.resume_from_path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"trainer.resume_from_path={folder} does not exist")
    return folder
