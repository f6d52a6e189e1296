"""Entry point: `python -m verl.trainer.main_ppo stage=gad KEY=VALUE ...`.

Hydra composes, the settings are typed and checked, Ray and the ranks' processes begin, data and models are looked at,
the trainer runs. torch, transformers and what needs them are loaded once the ranks' processes have begun, which load
theirs meanwhile: nothing that this file imports brings them along.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import hydra
import psutil
import ray
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from verl.monitor.live import StoppedByAlarm
from verl.single_controller.ray.output import RankOutput
from verl.single_controller.ray.starting import join_or_start, stop
from verl.trainer.config import Config, ConfigError, normalize_overrides, to_config
from verl.trainer.config.loading import check_shown, explain_refusals
from verl.trainer.config.overrides import flags_last
from verl.trainer.config.paths import with_absolute_paths
from verl.trainer.first_look import look_first, missing_paths, without_idle_critic
from verl.trainer.node_checks import check_nodes
from verl.trainer.options import asked_for_help
from verl.trainer.ppo.folders import may_resume, run_folder
from verl.trainer.ppo.roles import ResourcePoolManager, Role, preparing, resource_pools
from verl.utils import startup
from verl.utils.checkpoint.recovery import clear_up
from verl.utils.console import print_exception
from verl.utils.named import LoadedWhenAsked, as_named
from verl.utils.refusals import Findings, Refused, before_the_start, is_told_plainly, tell
from verl.utils.run_lock import only_run_in
from verl.utils.run_log import FOLDER, RANKS, log_to, log_to_terminal, phase
from verl.utils.signals import EndedBySignal, RunSignals, out_of_reach
from verl.utils.stalls import StallWatch, doing, duration
from verl.utils.tracking import ending_in_time

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

logger = logging.getLogger(__name__)

# The exit code of a run that is not started.
REFUSED = 1
# Hydra's flags that show the settings and run nothing; and those by which they are not this package's.
SHOWING = {"--cfg", "-c"}
OF_ANOTHER_FOLDER = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}


def __getattr__(name: str) -> object:
    """`create_rl_dataset`, which users of verl look for here, when somebody asks for it: it brings torch along."""
    if name == "create_rl_dataset":
        from verl.trainer.looking_over import create_rl_dataset

        return create_rl_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RanksAhead:
    """The ranks' processes, begun once, before it is known whether the run will start. What keeps them from it is told
    when it is asked for: what is wrong with the run's own input comes first."""

    def __init__(self, begin: Callable[[], None]):
        self._begin, self._begun, self._error = begin, False, None

    def begin(self) -> None:
        """Begin, unless it has been done."""
        if self._begun:
            return
        self._begun = True
        try:
            self._begin()
        except Exception as error:
            self._error = error

    def tell(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._error is not None:
            raise self._error


class TaskRunner:
    """Everything that a run needs, built and run; a subclass may swap parts, for instance the worker classes."""

    worker_classes: ClassVar[dict[Role, type]] = LoadedWhenAsked(
        {
            Role.ActorRollout: "verl.workers.fsdp_workers:ActorRolloutRefWorker",
            Role.Critic: "verl.workers.fsdp_workers:CriticWorker",
            Role.Rollout: "verl.workers.rollout_worker:RolloutWorker",
        }
    )
    trainer_class: ClassVar[type[RayPPOTrainer]] = LoadedWhenAsked("verl.trainer.ppo.ray_trainer:RayPPOTrainer")

    def run(self, config: Config) -> None:
        """Train. Settings, folders and files are checked before Ray starts, what is in them before any model is built.

        Raises:
            EndedBySignal: the run was told to end before its last step; between steps it has saved a checkpoint.
            StallError: nothing came of something for `trainer.stall_timeout` seconds.
            StoppedByAlarm: an alarm ended it, saved, with `trainer.on_alarm=stop`.
        """
        startup.begin()
        with ExitStack() as held:
            # A run that ends before its first step leaves no start to go on with, to a later run of this process.
            held.callback(startup.conclude)
            with before_the_start():
                config = without_idle_critic(with_absolute_paths(config))
                folder, signals, findings = run_folder(config.trainer), RunSignals(), Findings()
                with findings.gathered():
                    held.enter_context(only_run_in(folder))
                if findings:
                    _tell_all(config, findings)
            watch = StallWatch(config.trainer.stall_warning, config.trainer.stall_timeout)
            for held_too in (log_to(folder), signals.taken(), watch.at_work()):
                held.enter_context(held_too)
            clear_up(folder)
            with before_the_start():
                prepared = self._prepared(config, signals)
            if prepared is not None:
                from verl.trainer.ppo.ending import end_said

                runner, resumed = prepared
                with end_said(config, runner, resumed):
                    runner.fit()

    def _prepared(self, config: Config, signals: RunSignals) -> tuple[RayPPOTrainer, Path | None] | None:
        """The trainer with its workers, all checked, and the checkpoint that it goes on from; None, which is said, if
        nothing is left to train.

        The ranks' processes load what they need while this one loads its own, and looks at models' files and data. A
        run that may go on from a checkpoint waits for the data, which tell whether anything is left to train.
        """
        pools, findings = resource_pools(config), Findings()
        ranks = RanksAhead(lambda: self.begin(config, pools))
        try:
            look_first(config, findings)
            if not findings and not may_resume(config.trainer) and not missing_paths(config):
                ranks.begin()
            checked = self._checked(config, findings, signals, pools)
            if checked is None:
                return None
            ranks.begin()
            ranks.tell()
        except BaseException:
            pools.release()
            raise
        _say_what_trains(config)
        checked[0].init_workers()
        return checked

    def _checked(
        self, config: Config, findings: Findings, signals: RunSignals, pools: ResourcePoolManager
    ) -> tuple[RayPPOTrainer, Path | None] | None:
        """`_prepared`, its workers apart."""
        with phase("loading libraries for models and data"):
            from verl.trainer.checked_run import checked_run

            trainer_class, worker_classes = self.trainer_class, self.worker_classes
        # Some library that was being loaded may have taken it for an error of its own.
        signals.obey()
        checked = checked_run(config, findings, trainer_class, worker_classes, pools)
        if checked is not None:
            checked[0].signals = signals
        return checked

    def begin(self, config: Config, pools: ResourcePoolManager) -> None:
        """Start what the workers run on, and their processes, without waiting for these."""
        with doing("starting Ray"):
            self.start(config)
            pools.begin(partial(self._preparing, config))

    def _preparing(self, config: Config, roles: Sequence[Role]) -> Callable[[], None]:
        """What a process that will have these roles does before it has them."""
        engine = config.generates and (Role.Rollout if config.rollout_ranks else Role.ActorRollout) in roles
        classes = as_named(self, "worker_classes")
        return preparing(config, [classes[role] for role in roles], engine)

    def start(self, config: Config) -> None:
        """Start what the workers run on."""
        start_ray(config)


def _say_what_trains(config: Config) -> None:
    trainer, policy = config.trainer, config.actor_rollout_ref
    answers = f"answers by {policy.rollout.name}" if config.generates else "no answers are generated"
    if config.rollout_ranks:
        answers += f" on {config.rollout_ranks} x {trainer.device} of its own, a step ahead"
    logger.info(
        "%s: training on %d x %s in %s, %s",
        config.stage, trainer.ranks, trainer.device, policy.actor.fsdp_config.dtype, answers,
    )  # fmt: skip
    if config.rollout_ranks and config.algorithm.rollout_is is None and not config.use_sft:
        logger.warning(
            "trainer.rollout_ahead=1 with algorithm.rollout_is=null: answers of the policy of one update before "
            "are taken for the present one's, which biases its gradient; algorithm.rollout_is=token corrects for it"
        )


def _tell_all(config: Config, findings: Findings) -> None:
    """Raise what has been found, with all else that is wrong."""
    from verl.trainer.looking_over import look_over

    look_first(config, findings)
    look_over(config, findings)
    findings.tell()


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
    begun = psutil.Process().create_time()
    startup.begin(begun)
    startup.note("reading settings", time.time() - begun)
    logger.info("settings are read, after %s", duration(time.time() - begun))
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
