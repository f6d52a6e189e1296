"""Entry point: `python -m verl.trainer.main_ppo stage=gad KEY=VALUE ...`.

Hydra composes, the settings are typed and checked, data and models are looked at, Ray starts, the trainer runs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import hydra
import psutil
import ray
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from verl.batch import Prompts
from verl.models.loading import all_eos_token_ids, find_model, is_discriminator, quiet_transformers
from verl.monitor.live import StoppedByAlarm
from verl.single_controller.ray.output import RankOutput
from verl.single_controller.ray.starting import join_or_start, stop
from verl.trainer.config import Config, ConfigError, DataConfig, normalize_overrides, to_config
from verl.trainer.config.loading import check_shown, explain_refusals
from verl.trainer.config.overrides import flags_last
from verl.trainer.config.paths import with_absolute_paths
from verl.trainer.config.value_checks import NO_TEXT, doubt_of_rows, doubts
from verl.trainer.node_checks import check_nodes
from verl.trainer.options import asked_for_help
from verl.trainer.ppo.checkpointing import find_checkpoint, may_resume_critic, named_checkpoint, run_folder
from verl.trainer.ppo.disk import check_disk
from verl.trainer.ppo.ending import end_said, nothing_left, say_end
from verl.trainer.ppo.model_checks import check_device, check_engine, check_models, check_tokens
from verl.trainer.ppo.origin import Origin, check_same_run
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.roles import ResourcePoolManager, Role
from verl.utils.checkpoint.recovery import clear_up
from verl.utils.console import print_exception
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, find_files
from verl.utils.hub import parse_hub_name
from verl.utils.refusals import Findings, Refused, before_the_start, is_told_plainly, sentences_of, tell
from verl.utils.run_lock import check_writable, only_run_in
from verl.utils.run_log import FOLDER, RANKS, log_to, log_to_terminal, phase
from verl.utils.signals import EndedBySignal, RunSignals, out_of_reach
from verl.utils.stalls import StallWatch, doing, duration
from verl.utils.tracking import check_loggers, ending_in_time
from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

logger = logging.getLogger(__name__)

# The exit code of a run that is not started.
REFUSED = 1
# Hydra's flags that show the settings and run nothing; and those by which they are not this package's.
SHOWING = {"--cfg", "-c"}
OF_ANOTHER_FOLDER = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}


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


def look_over(config: Config, findings: Findings) -> PreTrainedTokenizerBase | None:
    """Look at everything but the rows of the data, which take longest; returns the student's tokenizer, if that can be
    had."""
    tokenizer = None
    with findings.gathered():
        check_loggers(config.trainer.logger)
    with findings.gathered():
        check_folders(config)
    with findings.gathered():
        check_device(config)
    with findings.gathered():
        check_engine(config)
    with findings.gathered():
        check_data_files(config.data)
    with findings.gathered(), phase("reading tokenizer and model files"):
        tokenizer = check_models(config)
    return tokenizer


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


def read_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[RLHFDataset, RLHFDataset | None]:
    """Training and validation rows; what is wrong with either is told."""
    data, findings, val = config.data, Findings(), None
    if config.custom_reward_function.path is not None:
        data = replace(data, return_raw_chat=True)
    ends = all_eos_token_ids(tokenizer, config.actor_rollout_ref.model.path)
    with phase("reading data"):
        with findings.gathered():
            train = create_rl_dataset(data.train_files, data, tokenizer, data.train_max_samples, ends)
        with findings.gathered():
            if data.val_files is not None:
                # Validation shows what the user said last.
                asked = replace(data, return_raw_chat=True)
                val = create_rl_dataset(data.val_files, asked, tokenizer, data.val_max_samples, ends)
        findings.tell()
    return train, val


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
        with ExitStack() as held:
            with before_the_start():
                config = without_idle_critic(with_absolute_paths(config))
                folder, signals, findings = run_folder(config.trainer), RunSignals(), Findings()
                with findings.gathered():
                    held.enter_context(only_run_in(folder))
                if findings:
                    look_over(config, findings)
                    findings.tell()
            watch = StallWatch(config.trainer.stall_warning, config.trainer.stall_timeout)
            for held_too in (log_to(folder), signals.taken(), watch.at_work()):
                held.enter_context(held_too)
            clear_up(folder)
            with before_the_start():
                prepared = self._prepared(config, signals)
            if prepared is not None:
                runner, resumed = prepared
                with end_said(config, runner, resumed):
                    runner.fit()

    def _prepared(self, config: Config, signals: RunSignals) -> tuple[RayPPOTrainer, Path | None] | None:
        """The trainer with its workers, all checked, and the checkpoint that it goes on from; None, which is said, if
        nothing is left to train."""
        trainer = config.trainer
        tokenizer, train, val = self._looked_at(config)
        own_tokens = OwnTokens.of(config, tokenizer)
        if own_tokens is not None:
            with phase("looking at the data as the discriminator reads it"):
                train, val = (None if rows is None else own_tokens.with_prompts(rows) for rows in (train, val))
        roles = [Role.ActorRollout] + ([Role.Critic] if config.use_critic else [])
        pools = ResourcePoolManager(
            {"global_pool": [trainer.n_gpus_per_node] * trainer.nnodes},
            dict.fromkeys(roles, "global_pool"),
            use_gpu=trainer.device != "cpu",
        )
        # Half of a row's bytes are columns that users of verl's names know and nothing here reads.
        collate = partial(collate_fn, columns=Prompts.names())
        runner = self.trainer_class(config, tokenizer, self.worker_classes, pools, train, val, collate)
        resumed = resumed_from(config)
        runner.origin = check_resume(config, len(train), resumed)
        runner.signals, runner.own_tokens = signals, own_tokens
        over = nothing_left(config, runner.total_steps, resumed)
        if over is not None:
            say_end(config, over)
            return None
        check_disk(config, runner.total_steps, resumed)
        with doing("starting Ray"):
            self.start(config)
        policy_settings = config.actor_rollout_ref
        logger.info(
            "%s: training on %d x %s in %s, answers by %s",
            config.stage, trainer.ranks, trainer.device, policy_settings.actor.fsdp_config.dtype,
            policy_settings.rollout.name,
        )  # fmt: skip
        runner.init_workers()
        return runner, resumed

    def _looked_at(self, config: Config) -> tuple[PreTrainedTokenizerBase, RLHFDataset, RLHFDataset | None]:
        """The student's tokenizer, training and validation data; of everything that is wrong, each is told."""
        findings = Findings()
        tokenizer = look_over(config, findings)
        findings.tell()
        for doubt in doubts(config):
            logger.warning("%s", doubt)
        train, val = read_data(config, tokenizer)
        for doubt in doubt_of_rows(len(train), config):
            logger.warning("%s", doubt)
        check_tokens(config, tokenizer, [train] if val is None else [train, val])
        return tokenizer, train, val

    def start(self, config: Config) -> None:
        """Start what the workers run on."""
        start_ray(config)


def start_ray(config: Config) -> None:
    """Join the cluster that `ray_kwargs.ray_init.address` or RAY_ADDRESS names, or start one on this machine alone."""
    if ray.is_initialized():
        return
    settings = config.ray_kwargs.ray_init
    with phase("starting Ray"), out_of_reach():
        join_or_start(settings.address, settings.num_cpus, config.trainer.nnodes)
    if config.trainer.nnodes > 1:
        with phase(f"looking at {config.trainer.nnodes} nodes"):
            check_nodes(config)
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
        config = to_config(composed, HydraConfig.get().overrides.task)
    except ConfigError as error:
        missing = [] if error.config is None else missing_paths(error.config)
        tell(Refused([*error.problems, *missing]).with_traceback(error.__traceback__))
        sys.exit(REFUSED)
    try:
        run_ppo(config)
    except EndedBySignal as end:
        logger.info("%s", end)
        sys.exit(end.exit_code)
    except StoppedByAlarm as end:
        logger.error("%s", end)
        sys.exit(end.exit_code)
    except Exception as error:
        if not is_told_plainly(error):
            raise
        tell(error)
        sys.exit(REFUSED)
    finally:
        say_what_is_waited_for()


def say_what_is_waited_for() -> None:
    """Name the threads that keep this process from ending: those of a user's code that goes on."""
    own = threading.main_thread()
    others = [thread.name for thread in threading.enumerate() if thread is not own and not thread.daemon]
    if others:
        logger.warning("the run is over; this process ends when its other threads do: %s", ", ".join(others))


def check_what_is_shown(arguments: list[str]) -> None:
    """After `--cfg job`: a line for settings that are still to be given, or have no effect.

    Raises:
        ConfigError: what a run would refuse.
    """
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("-")}
    if flags & SHOWING and not flags & OF_ANOTHER_FOLDER:
        log_to_terminal()
        for key in check_shown(arguments):
            print(f"note: {key} is still to be given", file=sys.stderr)


def main() -> None:
    """The command line."""
    if asked_for_help(sys.argv[1:]):
        return
    # A failure shows its whole traceback, the worker's first.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.excepthook = print_exception
    try:
        sys.argv[1:] = flags_last(normalize_overrides(sys.argv[1:]))
        with ending_in_time(), explain_refusals():
            _hydra_main()
            check_what_is_shown(sys.argv[1:])
    except ConfigError as error:
        tell(error)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
