"""The training loop: when to make a step (`steps.py`), to validate, to save, and what to log. Models, optimizers and
devices are the workers' business.

`global_step` counts finished updates: what is logged under step N starts from weights that N updates made, and
`global_step_N` holds those weights. The first step is step 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.batch import Prompts
from verl.config.run import Config
from verl.memory.check import check_run_memory
from verl.models.tokenizer import all_eos_token_ids
from verl.monitor.live import StoppedByAlarm
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
from verl.trainer.ppo.batches import batches_of, tell_steps
from verl.trainer.ppo.best import open_best
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.trainer.ppo.core_algos import AdaptiveKLController, get_kl_controller
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.display import dump_answers, open_monitor, open_tracking, progress_bar, show_step
from verl.trainer.ppo.engine import OwnEngine
from verl.trainer.ppo.folders import run_folder
from verl.trainer.ppo.generation import Metrics, OnPolicy, Timed
from verl.trainer.ppo.head_start import DiscriminatorCouldNotLearn, HeadStart
from verl.trainer.ppo.held_out import HeldOutPairs
from verl.trainer.ppo.metric_utils import compute_throughout_metrics, compute_timing_metrics
from verl.trainer.ppo.one_step_off import OneStepOff
from verl.trainer.ppo.origin import Origin
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.trainer.ppo.profiled_steps import ProfiledSteps
from verl.trainer.ppo.rejected import RejectedAnswers
from verl.trainer.ppo.reward import (
    apply_kl_penalty,
    compute_advantage,
    get_custom_reward_fn,
)
from verl.trainer.ppo.roles import ResourcePoolManager, Role, worker_roles
from verl.trainer.ppo.skipped import SkippedSteps
from verl.trainer.ppo.start_seconds import tell_start
from verl.trainer.ppo.steps import Step, Steps
from verl.trainer.ppo.student import Student
from verl.trainer.ppo.validation import Validation
from verl.utils.checkpoint.checkpoint_manager import AHEAD_FILE, HELD_OUT_FILE, REJECTED_FILE, REPLAY_FILE
from verl.utils.profiling import marked
from verl.utils.run_log import phase
from verl.utils.signals import RunSignals
from verl.utils.startup import noted
from verl.utils.tracking import Tracking
from verl.utils.units import counted

__all__ = [
    "RayPPOTrainer",
    "ResourcePoolManager",
    "Role",
    "apply_kl_penalty",
    "compute_advantage",
    "compute_response_mask",
    "marked_timer",
]

logger = logging.getLogger(__name__)

# Far from the seeds of training steps and from each other, so that none replays another's draws.
VALIDATION_SEED = 1_000_003
REJECTED_SEED = 2_000_003


@contextmanager
def marked_timer(name: str, timing: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent inside to `timing[name]`; in a trace they have that name too."""
    start = time.perf_counter()
    with marked(name):
        yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - start


# A name of verl's that nothing here calls.
def compute_response_mask(data: DataProto) -> torch.Tensor:
    """The last columns of `attention_mask`, as wide as `responses`: 1 on real answer tokens."""
    return data.batch["attention_mask"][:, -data.batch["responses"].shape[-1] :]


class RayPPOTrainer:
    """Runs one stage: SeqKD, warmup, GAD or SODA, as the configuration says. (The name is verl's.)

    Args:
        config: the whole run's settings.
        tokenizer: the student's.
        role_worker_mapping: worker class of each role.
        resource_pool_manager: where the roles run.
        train_dataset, val_dataset: rows as `RLHFDataset` gives them; no `val_dataset`, no validation.
        collate_fn: makes one dict of tensors and object arrays of a list of rows.
    """

    # What the run began with, which its checkpoints keep; None: they keep nothing of it.
    origin: Origin | None = None
    # How the discriminator reads answers; None: in the student's tokens.
    own_tokens: OwnTokens | None = None
    # Those that may end the run; these never arrive.
    signals: RunSignals = RunSignals()
    # The ranks, as a group for each of their roles.
    groups: Sequence[WorkerGroup] = ()

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        role_worker_mapping: dict[Role, type],
        resource_pool_manager: ResourcePoolManager,
        train_dataset: Dataset,
        val_dataset: Dataset | None,
        collate_fn: Callable[[list], dict],
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.role_worker_mapping = role_worker_mapping
        self.resource_pool_manager = resource_pool_manager
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.collate_fn = collate_fn
        self.kl_ctrl = get_kl_controller(config.algorithm.kl_ctrl)
        self.task_reward = get_custom_reward_fn(config)
        self.best = open_best(config)
        self.global_step = 0
        self.samples_seen = 0
        self.total_steps = tell_steps(config, len(train_dataset))

    # ------------------------------------------------------------ workers

    def init_workers(self) -> None:
        """Start one process per rank with every role in it, build the models there, and wrap them in handles."""
        config, eos_token_ids = self.config, all_eos_token_ids(self.tokenizer, self.config.actor_rollout_ref.model.path)
        with phase(f"starting {counted(config.processes, 'rank')}"):
            ends = eos_token_ids if self.own_tokens is None else (self.own_tokens.eos_token_id,)
            groups = self.spawn(worker_roles(config, self.role_worker_mapping, self.total_steps, ends))
        actor_rollout, critic = groups[str(Role.ActorRollout)], groups.get(str(Role.Critic))
        check_run_memory(config, actor_rollout.memory_sizes()[0])
        engines = groups.get(str(Role.Rollout))
        engine = None if engines is None else OwnEngine(actor_rollout, engines)
        building = None if engines is None else engines.init_model()
        with phase("building models: the student's"):
            actor_rollout.init_model()
        self.student = Student(config, actor_rollout, self.tokenizer, eos_token_ids, engine)
        self.discriminator = self.held_out = self.rejected = None
        files = {}
        if critic is not None:
            with phase("building models: the discriminator's"):
                critic.init_model()
            self.discriminator = Discriminator(config, critic, self.own_tokens)
            files[REPLAY_FILE] = self.discriminator.replay
            if self._measures_held_out():
                self.held_out = files[HELD_OUT_FILE] = HeldOutPairs(
                    config, self.student, self.discriminator, self.val_dataset, self.collate_fn, VALIDATION_SEED
                )
        self.head_start = HeadStart(config, None if self.held_out is None else self.held_out.accuracy, self.total_steps)
        if config.soda.enable:
            self.rejected = files[REJECTED_FILE] = RejectedAnswers(
                config, self.student, self.train_dataset, self.collate_fn, REJECTED_SEED
            )
        weighs = config.algorithm.rollout_is is not None
        self.generation = OnPolicy(self.student, self.head_start, weighs)
        if engine is not None:
            with phase("building the engines, on devices of their own"):
                building.get()
                engine.connect()
            rollout = config.actor_rollout_ref.rollout
            self.generation = files[AHEAD_FILE] = OneStepOff(self.student, engine, rollout, weighs)
        self.steps = Steps(
            config,
            self.student,
            self.discriminator,
            self.head_start,
            self.rejected,
            self.task_reward,
            self.kl_ctrl,
            self.total_steps,
            self.generation,
        )
        self.validation = Validation(
            config, self.student, self.val_dataset, self.collate_fn, self.task_reward, self.discriminator,
            self.held_out, VALIDATION_SEED,
        )  # fmt: skip
        self.groups = [group for group in (actor_rollout, critic) if group is not None]
        size = sum(group.checkpoint_bytes()[0] for group in self.groups)
        self.checkpoints = Checkpoints(config.trainer, actor_rollout, critic, files, self.origin, size)
        self.checkpoints.reserve()
        self.student.peak_memory()  # What building took is not the first step's.

    def spawn(self, roles: dict[str, RayClassWithInitArgs]) -> dict[str, WorkerGroup]:
        """One worker group per role, the roles of a rank in one process; engines of their own in processes beside."""
        manager, groups = self.resource_pool_manager, {}
        for name, pool in manager.create_resource_pool().items():
            its = {str(role): roles[str(role)] for role in manager.roles_in(name)}
            groups |= RayWorkerGroup(pool, create_colocated_worker_cls(its)).spawn(its)
        return groups

    # ------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way; resumes where a checkpoint was left."""
        config = self.config.trainer
        self._resume()
        if self.held_out is not None:
            with phase("sampling the held-out answers"):
                self.held_out.store(self.global_step)
        if self.global_step == 0:
            self.head_start.warn_of_a_blind_critic()
        if self.config.actor_rollout_ref.actor.fsdp_config.use_torch_compile:
            logger.info("the models' layers are compiled on the way, so that the first steps take longer")
        stage = self.config.stage
        with (
            self._open_tracking() as tracking,
            progress_bar(stage, self.total_steps, self.global_step) as bar,
            self.checkpoints.all_written(),
        ):
            if config.val_only:
                with phase(f"validating at step {self.global_step}"):
                    metrics = self.validation.run(self.global_step, tracking)
                return tracking.log(metrics, self.global_step)
            self.monitor = open_monitor(self.config, tracking, self.global_step)
            answered = closing(self.generation.through(self._batches(), self.global_step))
            with self.signals.at_step_ends(config.save_on_signal), answered as batches:
                complete = self._make_steps(batches, tracking, bar)
                # Here, because a signal that comes during the validation ends it at once.
                self.checkpoints.wait()
            complete = complete and self.signals.received is None
            if complete and config.test_freq > 0 and self.val_dataset is not None:
                self._log(tracking, self._validate(tracking, partial(marked_timer, timing={}))[0])
            self._prune()
        if complete and stage == "warmup":
            held_out = None if self.held_out is None else self.held_out.present_accuracy
            self.head_start.conclude(held_out, self.discriminator.balance.accuracy)

    def _make_steps(self, batches: Iterator[Prompts], tracking: Tracking, bar: tqdm) -> bool:
        """Make the steps that are left, validating and saving on the way; whether all of them were made. A signal or an
        early stop ends them before, with a checkpoint.

        Raises:
            StoppedByAlarm: an alarm is to end the run; it is saved.
        """
        for prompts in batches:
            self.checkpoints.settle()
            metrics, timing = {}, {}
            timed = partial(marked_timer, timing=timing)
            if self._validation_is_due():
                metrics, ends = self._validate(tracking, timed)
                if ends or self.signals.received is not None:
                    self._log(tracking, metrics)
                    self._save_unless_saved()
                    return False
            with self.profiled.at(self.global_step), timed("step"), noted("the first step"):
                made = self._make_step(prompts, timed)
            # Before a checkpoint of it is written, which is no part of the start.
            tell_start(self.config, self.groups)
            done, written = self.global_step + 1, None
            if self._save_is_due(done) or self.signals.received is not None:
                with timed("save_checkpoint"):
                    # First, so that older ones go before there is a further one.
                    self.checkpoints.wait()
                    self._prune()
                    written = self.write_checkpoint(done)
            else:
                self._prune()
            metrics |= self._step_metrics(made, timing)
            # First, because a run that goes on from the checkpoint does not make this step again.
            self._log(tracking, metrics)
            if written is not None:
                self.checkpoints.publish(written)
            self.skipped.end_if_too_many(metrics, done == self.total_steps)
            show_step(bar, metrics, in_lines="console" in self.config.trainer.logger)
            self.global_step = done
            self.samples_seen += self.config.data.train_batch_size
            if self.signals.received is not None:
                self._save_unless_saved()
                return False
            if self.monitor.stopped is not None:
                self._save_unless_saved()
                raise StoppedByAlarm(self.monitor.stopped)
        return True

    def _log(self, tracking: Tracking, metrics: Metrics) -> None:
        """Send a step's metrics to the trackers, and to the monitor, which may raise an alarm."""
        tracking.log(metrics, self.global_step)
        self.monitor.see(self.global_step, metrics)
        self.reached.update(metrics)

    def _save_unless_saved(self) -> None:
        """Save the present weights, where a step has been made since the newest checkpoint, which may be on its way."""
        self.checkpoints.wait()
        if self.global_step not in (0, self.checkpoints.saved_step):
            self.save(self.global_step)

    def _make_step(self, prompts: Prompts, timed: Timed) -> Step:
        """One step. If the discriminator's head start gives up, a checkpoint is saved before the run ends."""
        try:
            made = self.steps.make(prompts, self.global_step, self.samples_seen, timed)
        except DiscriminatorCouldNotLearn:
            self.save(self.global_step)
            raise
        self.skipped.see(made, self.global_step)
        return made

    @cached_property
    def reached(self) -> dict[str, float]:
        """The last value of every metric."""
        return {}

    @cached_property
    def profiled(self) -> ProfiledSteps:
        """The steps that are traced."""
        return ProfiledSteps(self.config, self.groups)

    @cached_property
    def skipped(self) -> SkippedSteps:
        """The steps whose update was left out."""
        trainer = self.config.trainer
        return SkippedSteps(run_folder(trainer), trainer.max_skipped_steps)

    def _batches(self) -> Iterator[Prompts]:
        """Batches from the first row not seen yet to the last step's."""
        left = self.total_steps - self.global_step
        return batches_of(self.train_dataset, self.collate_fn, self.config.data, left, self.samples_seen)

    # ------------------------------------------------------------ around the loop

    def _save_is_due(self, done: int) -> bool:
        """Whether a checkpoint is to be written after so many steps. While updates are skipped the weights are those of
        an earlier step, and may be what is wrong: only the run's end saves them."""
        frequency = self.config.trainer.save_freq
        return done == self.total_steps or (not self.skipped.in_a_row and frequency > 0 and done % frequency == 0)

    def _prune(self) -> None:
        """Remove older checkpoints, unless the newest one's weights have made no step that could be taken."""
        if not self.skipped.in_a_row:
            self.checkpoints.prune()

    def _due(self, frequency: int) -> bool:
        return frequency > 0 and self.global_step % frequency == 0

    def _measures_held_out(self) -> bool:
        """Whether the discriminator is measured on held-out pairs: for its head start, or when the run validates."""
        if not self.config.critic.held_out_prompts or self.val_dataset is None:
            return False
        return self.config.trainer.critic_warmup == "auto" or self.config.validates

    def _validation_is_due(self) -> bool:
        if self.val_dataset is None:
            return False
        return self._due(self.config.trainer.test_freq) if self.global_step else self.config.trainer.val_before_train

    def _validate(self, tracking: Tracking, timed: Timed) -> tuple[Metrics, bool]:
        """Validate, and keep the weights if they are the best so far; whether the run is to end here, its last weights
        saved."""
        with timed("testing"), phase(f"validating at step {self.global_step}"):
            metrics = self.validation.run(self.global_step, tracking)
        best, step = self.best, self.global_step
        if best is None:
            return metrics, False
        is_best, ends = best.decide(step, metrics, self.total_steps, self.head_start.first_actor_step)
        if is_best or ends:
            self.checkpoints.wait()
        if (is_best or ends) and self.checkpoints.saved_step != step:
            with timed("save_checkpoint"):
                self.save(step, only_as_best=not ends)
        elif is_best:
            self.checkpoints.point_best(step)
        return metrics | best.metrics(), ends

    def _resume(self) -> None:
        folder = self.checkpoints.find()
        if folder is None:
            return
        state = self.checkpoints.load(folder)
        self.student.weights_changed()
        if self.discriminator is not None:
            self.discriminator.balance.accuracy = state.d_acc
        self.global_step, self.samples_seen = state.global_step, state.samples_seen
        if self.head_start.auto:
            self.head_start.first_actor_step, self.head_start.held = state.first_actor_step, state.head_start_held
        if isinstance(self.kl_ctrl, AdaptiveKLController):
            self.kl_ctrl.value = state.kl_coef
        if self.best is not None:
            self.best.load(state.best)
            self.checkpoints.restore_best(self.best.state)
        if self.global_step >= self.total_steps:
            logger.info("%d of %d steps are done already: nothing is left to train", self.global_step, self.total_steps)

    def save(self, step: int, only_as_best: bool = False) -> None:
        """Write `global_step_N` of the present weights, which `step` updates made, between steps or at a step's end; it
        is on the disk on return."""
        self.checkpoints.publish(self.write_checkpoint(step, only_as_best))
        self.checkpoints.wait()

    def write_checkpoint(self, step: int, only_as_best: bool = False) -> RunState:
        """Write that checkpoint as `global_step_N.tmp`; returns the state to pass to `Checkpoints.publish`."""
        state = RunState(
            global_step=step,
            samples_seen=self.samples_seen + (step - self.global_step) * self.config.data.train_batch_size,
            kl_coef=self.kl_ctrl.value,
            best=None if self.best is None else self.best.state,
            d_acc=None if self.discriminator is None else self.discriminator.balance.accuracy,
            **self.head_start.state(),
        )
        self.checkpoints.write(state, only_as_best)
        return state

    def _open_tracking(self) -> Tracking:
        return open_tracking(self.config, self.global_step, self.total_steps)

    def _step_metrics(self, step: Step, timing: dict[str, float]) -> Metrics:
        """The step's metrics and what it took; its answers go to `rollout_data_dir`."""
        made = step.table()
        dumps = self.config.trainer.rollout_data_dir
        if dumps is not None and step.answers is not None:
            texts = self.student.texts(step.answers.responses, step.answers.response_mask)
            dump_answers(Path(dumps) / f"{self.global_step}.jsonl", step.prompts, texts, step.scores)
        return {
            **step.metrics,
            **compute_timing_metrics(made, timing),
            **compute_throughout_metrics(made, timing, self.config.processes),
            **self.student.peak_memory(),
            "perf/cpu_memory_used_gb": psutil.virtual_memory().used / 2**30,
            "training/global_step": self.global_step,
            "training/epoch": (self.samples_seen + len(step.prompts)) / len(self.train_dataset),
        }
