"""What is looked at before a run starts, as far as it can be without torch and transformers, which take many seconds to
load: settings against the machine, folders, whether files are there. Ray and the ranks' processes begin on that, and
`looking_over.py` looks at the rest meanwhile.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from verl.models.finding import find_model, is_discriminator
from verl.trainer.config import Config, DataConfig
from verl.trainer.config.value_checks import NO_TEXT
from verl.trainer.ppo.folders import may_resume_critic, named_checkpoint
from verl.utils.dataset.data_files import find_files
from verl.utils.devices import sees_cuda
from verl.utils.hub import parse_hub_name
from verl.utils.refusals import Findings, sentences_of
from verl.utils.run_lock import check_writable
from verl.utils.socket_folder import check_session_folder
from verl.utils.tracking import check_loggers

logger = logging.getLogger(__name__)


def check_folders(config: Config) -> None:
    """OSError for folders beside the run's own: those that the run is to write and cannot, and a checkpoint's that is
    not there."""
    trainer = config.trainer
    folders = {"rollout_data_dir": trainer.rollout_data_dir, "validation_data_dir": trainer.validation_data_dir}
    if "tensorboard" in trainer.logger:
        folders["default_tensorboard_dir"] = trainer.default_tensorboard_dir
    findings = Findings()
    for setting, folder in folders.items():
        with findings.gathered():
            if folder is not None:
                check_writable(Path(folder).expanduser(), f"trainer.{setting}")
    # Nothing more of checkpoints: they may be those of another run that is at work here.
    with findings.gathered():
        if trainer.resume_mode == "resume_path":
            named_checkpoint(trainer)
    findings.tell()


def check_device(config: Config) -> None:
    """ValueError if the run is to use GPUs, and there is none on this machine, which is the only one."""
    if config.trainer.device == "cuda" and not sees_cuda() and not _cluster(config):
        raise ValueError(
            "trainer.device=cuda, and torch finds no GPU on this machine: set trainer.device=cpu, or see what "
            "nvidia-smi and CUDA_VISIBLE_DEVICES say, and for which CUDA torch was built (python -m "
            "torch.utils.collect_env)"
        )


def check_ray_folder(config: Config) -> None:
    """OSError or ValueError if Ray is to be started here and has no room for its files."""
    if config.trainer.nnodes == 1 and not _cluster(config):
        check_session_folder()


def _cluster(config: Config) -> str | None:
    return config.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS")


def check_engine(config: Config) -> None:
    """ModuleNotFoundError if the generation engine is not installed and something is to be generated."""
    if config.generates and config.actor_rollout_ref.rollout.name == "vllm" and find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "actor_rollout_ref.rollout.name=vllm, the default on GPUs, needs vLLM, which is not installed: "
            "pip install -e '.[gpu]', or set actor_rollout_ref.rollout.name=hf, which is slow"
        )


def check_data_files(data: DataConfig) -> None:
    """The files of both settings are there, or it is told which are not."""
    findings = Findings()
    for setting in ("train_files", "val_files"):
        with findings.gathered():
            if getattr(data, setting) is not None:
                find_files(getattr(data, setting))
    findings.tell()


def missing_paths(config: Config) -> list[str]:
    """Sentences about data files and model folders that are not there; names of the hub are not asked for."""
    findings = Findings()
    for names in (config.data.train_files, config.data.val_files):
        for name in [names] if isinstance(names, str) else names or []:
            with findings.gathered():
                if name not in NO_TEXT and parse_hub_name(name, "dataset") is None:
                    find_files(name)
    models = [config.actor_rollout_ref.model.path] + [config.critic.model.path] * config.use_critic
    for path in dict.fromkeys(models):
        with findings.gathered():
            if parse_hub_name(path, "model") is None:
                find_model(path)
    return [sentence for error in findings.errors for sentence in sentences_of(error)]


def without_idle_critic(config: Config) -> Config:
    """Without a discriminator where only the student is looked at: `trainer.val_only`, and neither the settings nor a
    checkpoint have a trained one."""
    if not (config.trainer.val_only and config.use_critic):
        return config
    with suppress(OSError, ValueError):
        if not may_resume_critic(config.trainer) and not is_discriminator(config.critic.model.path):
            logger.info("trainer.val_only=True: no discriminator takes part, as critic.model.path names no trained one")
            return replace(config, trainer=replace(config.trainer, critic_warmup=-1))
    return config


def look_first(config: Config, findings: Findings) -> None:
    """Look at everything but models and the rows of the data, which take longest."""
    with findings.gathered():
        check_loggers(config.trainer.logger)
    with findings.gathered():
        check_folders(config)
    with findings.gathered():
        check_ray_folder(config)
    with findings.gathered():
        check_device(config)
    with findings.gathered():
        check_engine(config)
    with findings.gathered():
        check_data_files(config.data)
