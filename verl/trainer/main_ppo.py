"""Entry point: `python -m verl.trainer.main_ppo stage=gad KEY=VALUE ...`.

Hydra composes, the settings are typed and checked, data and models are looked at, Ray starts, the trainer runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import hydra
import psutil
import ray
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from verl.batch import Prompts
from verl.models.loading import all_eos_token_ids, quiet_transformers
from verl.monitor.live import StoppedByAlarm
from verl.single_controller.ray.output import RankOutput
from verl.single_controller.ray.starting import join_or_start, stop
from verl.trainer.config import Config, ConfigError, DataConfig, normalize_overrides, to_config
from verl.trainer.config.loading import explain_refusals
from verl.trainer.config.paths import with_absolute_paths
from verl.trainer.options import asked_for_help
from verl.trainer.ppo.checkpointing import find_checkpoint, run_folder
from verl.trainer.ppo.model_checks import check_engine, check_models, check_tokens
from verl.trainer.ppo.origin import Origin, check_same_run
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import ResourcePoolManager, Role
from verl.utils.checkpoint.recovery import clear_up
from verl.utils.console import print_exception, printable
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.run_lock import check_writable, only_run_in
from verl.utils.run_log import FOLDER, RANKS, log_to, log_to_terminal, phase
from verl.utils.signals import EndedBySignal, RunSignals, out_of_reach
from verl.utils.stalls import StallWatch, doing, duration
from verl.utils.tracking import check_loggers, ending_in_time
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

logger = logging.getLogger(__name__)


def create_rl_dataset(
    data_paths: str | list[str],
    data_config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_samples: int = -1,
    eos_token_ids: tuple[int, ...] = (),
) -> RLHFDataset:
    """The rows of one or several files, checked; ValueError for bad rows (see `RLHFDataset`)."""
    return RLHFDataset(
        data_paths,
        tokenizer,
        data_config,
        max_samples=max_samples,
        eos_token_ids=eos_token_ids,
        special_token_text=data_config.special_token_text,
        cache_dir=data_config.cache_dir,
        turns=data_config.turns,
    )


def check_resume(config: Config, rows: int) -> Origin:
    """The models and data that this run begins with. Refuses to resume a run that began with others
    (`check_same_run`)."""
    now = Origin.of(config, rows)
    folder = find_checkpoint(config.trainer, ("actor", "critic") if config.use_critic else ("actor",))
    if folder is not None:
        check_same_run(folder, now, config)
    return now


def check_folders(config: Config) -> None:
    """OSError for a folder beside the run's own that the run is to write and cannot."""
    trainer = config.trainer
    folders = {"rollout_data_dir": trainer.rollout_data_dir, "validation_data_dir": trainer.validation_data_dir}
    if "tensorboard" in trainer.logger:
        folders["default_tensorboard_dir"] = trainer.default_tensorboard_dir
    for setting, folder in folders.items():
        if folder is not None:
            check_writable(Path(folder).expanduser(), f"trainer.{setting}")


class TaskRunner:
    """Everything that a run needs, built and run; a subclass may swap parts, for instance the worker classes."""

    worker_classes: ClassVar[dict[Role, type]] = {Role.ActorRollout: ActorRolloutRefWorker, Role.Critic: CriticWorker}
    trainer_class: ClassVar[type[RayPPOTrainer]] = RayPPOTrainer

    def run(self, config: Config) -> None:
        """Train. Data, configs and the tokenizers of all models are checked before Ray starts.

        Raises:
            EndedBySignal: the run was told to end before its last step; between steps it has saved a checkpoint.
            StallError: nothing came of something for `trainer.stall_timeout` seconds.
            StoppedByAlarm: an alarm ended it, saved, with `trainer.on_alarm=stop`.
        """
        config = with_absolute_paths(config)
        folder, signals = run_folder(config.trainer), RunSignals()
        watch = StallWatch(config.trainer.stall_warning, config.trainer.stall_timeout)
        with only_run_in(folder), log_to(folder), signals.taken(), watch.at_work():
            clear_up(folder)
            self._run(config, signals)

    def _run(self, config: Config, signals: RunSignals) -> None:
        data, trainer = config.data, config.trainer
        if config.custom_reward_function.path is not None:
            data = replace(data, return_raw_chat=True)
        check_loggers(trainer.logger)
        check_folders(config)
        check_engine(config)
        with phase("reading tokenizer and model files"):
            tokenizer = check_models(config)
        ends = all_eos_token_ids(tokenizer, config.actor_rollout_ref.model.path)
        val = None
        with phase("reading data"):
            train = create_rl_dataset(data.train_files, data, tokenizer, data.train_max_samples, ends)
            if data.val_files is not None:
                # Validation shows what the user said last.
                asked = replace(data, return_raw_chat=True)
                val = create_rl_dataset(data.val_files, asked, tokenizer, data.val_max_samples, ends)
        check_tokens(config, tokenizer, [train] if val is None else [train, val])
        roles = [Role.ActorRollout] + ([Role.Critic] if config.use_critic else [])
        pools = ResourcePoolManager(
            {"global_pool": [trainer.n_gpus_per_node] * trainer.nnodes},
            dict.fromkeys(roles, "global_pool"),
            use_gpu=trainer.device != "cpu",
        )
        # Half of a row's bytes are columns that users of verl's names know and nothing here reads.
        collate = partial(collate_fn, columns=Prompts.names())
        runner = self.trainer_class(config, tokenizer, self.worker_classes, pools, train, val, collate)
        runner.origin = check_resume(config, len(train))
        runner.signals = signals
        with doing("starting Ray"):
            self.start(config)
        policy_settings = config.actor_rollout_ref
        logger.info(
            "%s: training on %d x %s in %s, answers by %s",
            config.stage, trainer.ranks, trainer.device, policy_settings.actor.fsdp_config.dtype,
            policy_settings.rollout.name,
        )  # fmt: skip
        runner.init_workers()
        runner.fit()

    def start(self, config: Config) -> None:
        """Start what the workers run on."""
        start_ray(config)


def start_ray(config: Config) -> None:
    """Join the cluster that `ray_kwargs.ray_init.address` or RAY_ADDRESS names, or start one on this machine alone."""
    if ray.is_initialized():
        return
    settings = config.ray_kwargs.ray_init
    with phase("starting Ray"), out_of_reach():
        join_or_start(settings.address, settings.num_cpus)
    RankOutput(run_folder(config.trainer) / FOLDER / RANKS).take_over()
    if config.trainer.device == "cpu" and ray.cluster_resources().get("GPU"):
        logger.warning(
            "the cluster has %d GPUs and trainer.device=cpu leaves them idle (it is cuda by itself only where the "
            "driver sees a GPU): set trainer.device=cuda to use them", ray.cluster_resources()["GPU"],
        )  # fmt: skip


def run_ppo(config: Config, task_runner_class: type[TaskRunner] | None = None) -> None:
    """Train; stop Ray, however it ends, unless the caller had started it."""
    callers = ray.is_initialized()
    try:
        (task_runner_class or TaskRunner)().run(config)
    finally:
        if not callers:
            stop()


@hydra.main(config_path="config", config_name="ppo_trainer", version_base="1.3")
def _hydra_main(composed: DictConfig) -> None:
    log_to_terminal()
    logger.info("libraries are loaded, after %s", duration(time.time() - psutil.Process().create_time()))
    quiet_transformers()
    try:
        config = to_config(composed)
    except ConfigError as error:
        sys.exit(printable(str(error)))
    try:
        run_ppo(config)
    except EndedBySignal as end:
        logger.info("%s", end)
        sys.exit(end.exit_code)
    except StoppedByAlarm as end:
        logger.error("%s", end)
        sys.exit(end.exit_code)
    finally:
        say_what_is_waited_for()


def say_what_is_waited_for() -> None:
    """Name the threads that keep this process from ending: those of a user's code that goes on."""
    own = threading.main_thread()
    others = [thread.name for thread in threading.enumerate() if thread is not own and not thread.daemon]
    if others:
        logger.warning("the run is over; this process ends when its other threads do: %s", ", ".join(others))


def main() -> None:
    """The command line."""
    if asked_for_help(sys.argv[1:]):
        return
    # A failure shows its whole traceback, the worker's first.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.excepthook = print_exception
    try:
        sys.argv[1:] = normalize_overrides(sys.argv[1:])
        with ending_in_time(), explain_refusals():
            _hydra_main()
    except ConfigError as error:
        sys.exit(printable(str(error)))


if __name__ == "__main__":
    main()
