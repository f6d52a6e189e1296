"""The training loop. It sees worker groups and batches; models, optimizers and devices are the workers' business.

`global_step` counts finished updates: what is logged under step N starts from weights that N updates made, and
`global_step_N` holds those weights. The first step is step 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.batch import (
    ANCHOR_COEF,
    GROUP_KEYS,
    PAIR_REFERENCE_KEYS,
    POLICY_KEYS,
    PROMPT_KEYS,
    STUDENT_KEYS,
    TEACHER_KEYS,
)
from verl.config import SamplingConfig
from verl.config.run import Config
from verl.memory.check import check_run_memory
from verl.models.loading import all_eos_token_ids
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
from verl.trainer.ppo.balancing import balance
from verl.trainer.ppo.best import keep_best, open_best
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.trainer.ppo.core_algos import AdaptiveKLController, closing_eos, get_kl_controller
from verl.trainer.ppo.discriminator_step import DiscriminatorStep
from verl.trainer.ppo.head_start import DiscriminatorCouldNotLearn, HeadStart
from verl.trainer.ppo.held_out import HeldOutPairs
from verl.trainer.ppo.metric_utils import (
    compute_data_metrics,
    compute_discriminator_metrics,
    compute_sync_metrics,
    compute_throughout_metrics,
    compute_timing_metrics,
)
from verl.trainer.ppo.origin import Origin
from verl.trainer.ppo.rejected import RejectedAnswers
from verl.trainer.ppo.reward import apply_kl_penalty, compute_advantage, get_custom_reward_fn, reward_answers
from verl.trainer.ppo.roles import ResourcePoolManager, Role
from verl.trainer.ppo.validation import validate
from verl.utils.checkpoint.checkpoint_manager import HELD_OUT_FILE, REJECTED_FILE, REPLAY_FILE
from verl.utils.dataset.sampler import EpochBatches
from verl.utils.dump import dump_jsonl
from verl.utils.rouge import mean_rouge_l
from verl.utils.torch_functional import masked_mean
from verl.utils.tracking import Tracking

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
# What the progress bar shows, where a step has it.
SHOWN = {
    "actor/sft_loss": "loss",
    "actor/soda_loss": "loss",
    "actor/soda_acc": "acc",
    "critic/d_acc": "d_acc",
    "critic/score_diff": "score_diff",
    "response_length/mean": "length",
    "val/rouge-L/mean": "val rouge-L",
}


@contextmanager
def marked_timer(name: str, timing: dict[str, float]) -> Iterator[None]:
    """Add the seconds spent inside to `timing[name]`."""
    start = time.perf_counter()
    yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - start


def compute_response_mask(data: DataProto) -> torch.Tensor:
    """The last columns of `attention_mask`, as wide as `responses`: 1 on real answer tokens."""
    return data.batch["attention_mask"][:, -data.batch["responses"].shape[-1] :]


class RayPPOTrainer:
    """Runs one stage: SeqKD, warmup, GAD or SODA, as the configuration says.

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
        self.eos_token_ids = all_eos_token_ids(tokenizer, config.actor_rollout_ref.model.path)
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
        self.total_steps = self._count_steps()
        self._engine_is_current = False

    def _count_steps(self) -> int:
        rows, batch = len(self.train_dataset), self.config.data.train_batch_size
        epochs = self.config.trainer.total_epochs
        steps = self.config.trainer.total_training_steps or rows * epochs // batch
        if steps == 0:
            raise ValueError(
                f"{rows} training rows times {epochs} epochs do not fill one batch of {batch}: lower "
                "data.train_batch_size or raise trainer.total_epochs"
            )
        logger.info("%d training rows, batches of %d: %d steps, %.2f epochs", rows, batch, steps, steps * batch / rows)
        if self.config.frozen_actor_steps >= steps:
            logger.warning(
                "trainer.critic_warmup=%s covers all %d steps: only the discriminator will be trained",
                self.config.trainer.critic_warmup, steps,
            )  # fmt: skip
        return steps

    # ------------------------------------------------------------ workers

    def init_workers(self) -> None:
        """Start one process per rank with every role in it, and build the models there."""
        config = self.config
        common = {"device": config.trainer.device, "seed": config.data.seed}
        roles = {
            str(Role.ActorRollout): RayClassWithInitArgs(
                self.role_worker_mapping[Role.ActorRollout],
                config.actor_rollout_ref,
                use_reference=config.use_reference,
                total_steps=max(1, self.total_steps - config.frozen_actor_steps),
                **common,
            )
        }
        if config.use_critic:
            roles[str(Role.Critic)] = RayClassWithInitArgs(
                self.role_worker_mapping[Role.Critic],
                config.critic,
                total_steps=self.total_steps,
                eos_token_ids=self.eos_token_ids,
                **common,
            )
        groups = self.spawn(roles)
        self.actor_rollout = groups[str(Role.ActorRollout)]
        self.critic = groups.get(str(Role.Critic))
        check_run_memory(config, self.actor_rollout.memory_sizes()[0])
        logger.info("%d ranks are up; building models", self.config.trainer.ranks)
        self.actor_rollout.init_model()
        self.discriminator, self.held_out = None, None
        if self.critic is not None:
            self.critic.init_model()
            self.discriminator = DiscriminatorStep(config, self.critic)
            auto = config.trainer.critic_warmup == "auto"
            if config.critic.held_out_prompts and self.val_dataset is not None and (auto or self._validates()):
                self.held_out = HeldOutPairs(self, VALIDATION_SEED)
        self.head_start = HeadStart(config, None if self.held_out is None else self.held_out.accuracy, self.total_steps)
        self.rejected = None
        if config.soda.enable:
            self.rejected = RejectedAnswers(self, REJECTED_SEED, self._check_sync)
        self.checkpoints = Checkpoints(config.trainer, self.actor_rollout, self.critic, self.origin)
        self._peak_memory()  # What building took is not the first step's.

    def spawn(self, roles: dict[str, RayClassWithInitArgs]) -> dict[str, WorkerGroup]:
        """One worker group per role, the roles of a rank in one process."""
        pools = self.resource_pool_manager.create_resource_pool()
        pool = pools[self.resource_pool_manager.mapping[Role.ActorRollout]]
        return RayWorkerGroup(pool, create_colocated_worker_cls(roles)).spawn(roles)

    # ------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way; resumes where a checkpoint was left."""
        config = self.config.trainer
        self._resume()
        if self.held_out is not None:
            self.held_out.store()
        if self.global_step == 0:
            self.head_start.warn_of_a_blind_critic()
        with self._open_tracking() as tracking, self._progress() as progress:
            if config.val_only:
                return tracking.log(self._validate(tracking), self.global_step)
            for batch in self._batches():
                metrics, timing = {}, {}
                if self._validation_is_due():
                    with marked_timer("testing", timing):
                        metrics |= self._validate(tracking)
                    if keep_best(self, metrics, partial(marked_timer, timing=timing)):
                        return tracking.log(metrics, self.global_step)
                with marked_timer("step", timing):
                    batch = self._training_step(batch, metrics, timing)
                done, written = self.global_step + 1, None
                if done == self.total_steps or (config.save_freq > 0 and done % config.save_freq == 0):
                    with marked_timer("save_checkpoint", timing):
                        written = self.write_checkpoint(done)
                metrics |= self._step_metrics(batch, timing)
                # First, because a run that goes on from the checkpoint does not make this step again.
                tracking.log(metrics, self.global_step)
                if written is not None:
                    self.checkpoints.publish(written)
                self._show(progress, metrics)
                self.global_step = done
            if config.test_freq > 0 and self.val_dataset is not None:
                metrics = self._validate(tracking)
                keep_best(self, metrics)
                tracking.log(metrics, self.global_step)

    def _training_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """The stage's own; returns the batch with what was added to it, in the order that the workers got it in."""
        if self.config.soda.enable:
            return self._soda_step(batch, metrics, timing)
        step = self._adversarial_step if self.config.use_critic else self._sft_step
        return step(batch, metrics, timing)

    def _sft_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """SeqKD: one update on the teacher's answers. The student's are sampled for monitoring only."""
        batch = self._balance(batch, metrics)
        frequency = self.config.trainer.sft_monitor_freq
        if self._due(self.config.trainer.test_freq if frequency is None else frequency):
            with marked_timer("gen", timing):
                self._generate(batch)
            metrics["train/rouge-L/mean"] = self._sampled_rouge(batch)
        self._imitation_step(batch, metrics, partial(marked_timer, timing=timing))
        metrics |= compute_data_metrics(batch, use_critic=False)
        return batch

    def _adversarial_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """Warmup and GAD: the student answers, the discriminator scores and learns, then the student does."""
        timed = partial(marked_timer, timing=timing)
        with timed("testing"):
            metrics |= self._check_head_start()
        with timed("push_weights"):
            self._push_weights()
        with timed("gen"):
            self._generate(batch)
        batch = self._balance(batch, metrics)
        metrics |= self.discriminator.run(batch, self.global_step, timed)
        if self.config.use_sft:
            self._imitation_step(batch, metrics, timed)
        else:
            self._policy_step(batch, metrics, timed)
        metrics |= compute_data_metrics(batch, use_critic=not self.config.use_sft)
        metrics |= compute_discriminator_metrics(batch)
        return batch

    def _soda_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """SODA: one update on pairs of the teacher's answer and one that the student wrote before."""
        with marked_timer("rejected", timing):
            metrics |= self.rejected.add_to(batch)
        batch = self._balance(batch, metrics)
        pairs = self.take(batch, GROUP_KEYS + PAIR_REFERENCE_KEYS)
        pairs.meta_info = {"soda": self.config.soda}
        with marked_timer("update_actor", timing):
            self._engine_is_current = False
            metrics |= self.actor_rollout.update_actor_on_pairs(pairs)[0]
        metrics |= compute_data_metrics(batch, use_critic=False)
        return batch

    def _check_head_start(self) -> dict[str, float]:
        """See whether the discriminator's head start is over; what it has learned is kept if it ends the run."""
        try:
            return self.head_start.check(self.global_step)
        except DiscriminatorCouldNotLearn:
            self.save(self.global_step)
            raise

    def _imitation_step(self, batch: DataProto, metrics: dict[str, float], timed: Callable) -> None:
        """The actor's update on the teacher's answers."""
        if "responses" in batch.batch:
            with timed("old_log_prob"):
                self._check_sync(batch, metrics)
        with timed("update_actor"):
            metrics |= self._update_actor(batch, TEACHER_KEYS)

    def _policy_step(self, batch: DataProto, metrics: dict[str, float], timed: Callable) -> None:
        """Log-probs where the reward or the update asks for them, rewards, advantages and, unless the actor is frozen
        still, its update."""
        answers = self.take(batch, PROMPT_KEYS + STUDENT_KEYS)
        trains = self.head_start.actor_trains(self.global_step)
        in_reward = self.config.algorithm.use_kl_in_reward
        with timed("old_log_prob"):
            if in_reward or (trains and self.config.needs_old_log_probs):
                batch.union(self.actor_rollout.compute_log_prob(answers))
            self._check_sync(batch, metrics)
        if in_reward or (trains and self.config.use_reference):
            with timed("ref"):
                batch.union(self.actor_rollout.compute_ref_log_prob(answers))
        with timed("adv"):
            metrics |= self._compute_advantages(batch, kl_adapts=trains)
        if trains:
            with timed("update_actor"):
                # Left out where they are the update's own, to the last bit.
                left_out = () if self.config.needs_old_log_probs else ("old_log_probs",)
                keys = tuple(key for key in POLICY_KEYS if key not in left_out)
                metrics |= self._update_actor(batch, STUDENT_KEYS + keys, self._sft_anchor_coef())

    # ------------------------------------------------------------ parts of a step

    def _batches(self) -> Iterator[DataProto]:
        """Batches from the first row not seen yet to the last step's."""
        data = self.config.data
        sampler = EpochBatches(
            rows=len(self.train_dataset),
            batch_size=data.train_batch_size,
            batches=self.total_steps - self.global_step,
            seed=data.seed if data.shuffle else None,
            start=self.samples_seen,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            num_workers=data.dataloader_num_workers,
            collate_fn=self.collate_fn,
        )
        for rows in loader:
            yield DataProto.from_single_dict(rows)
            self.samples_seen += data.train_batch_size

    def _due(self, frequency: int) -> bool:
        return frequency > 0 and self.global_step % frequency == 0

    def _validates(self) -> bool:
        """Whether the run validates at all."""
        trainer = self.config.trainer
        return self.val_dataset is not None and (trainer.val_only or trainer.val_before_train or trainer.test_freq > 0)

    def _validation_is_due(self) -> bool:
        if self.val_dataset is None:
            return False
        return self._due(self.config.trainer.test_freq) if self.global_step else self.config.trainer.val_before_train

    def take(self, batch: DataProto, keys: tuple[str, ...]) -> DataProto:
        """The tensors that a call needs; nothing else travels."""
        return batch.select([key for key in keys if key in batch.batch], non_tensor_batch_keys=[])

    def _generate(self, batch: DataProto) -> None:
        """Add the student's answers, drawn from the present weights, to the batch."""
        rollout = self.config.actor_rollout_ref.rollout
        seed = rollout.seed + self.global_step
        batch.union(self.generate(batch, rollout.sampling, seed, rollout.sync_check_prompts))

    def generate(self, batch: DataProto, sampling: SamplingConfig, seed: int, report_log_probs: int = 0) -> DataProto:
        """Answers to a batch's prompts, from an engine that has the policy's present weights."""
        self._push_weights()
        prompts = self.take(batch, PROMPT_KEYS)
        prompts.meta_info = {"sampling": sampling, "seed": seed, "report_log_probs": report_log_probs}
        answers = self.actor_rollout.generate_sequences(prompts)
        self._engine_is_current = not self.config.actor_rollout_ref.rollout.drops_weights
        return answers

    def _push_weights(self) -> None:
        """Bring the engine to the policy's present weights, unless it has them."""
        if not self._engine_is_current:
            self.actor_rollout.push_weights()
            self._engine_is_current = True

    def _balance(self, batch: DataProto, metrics: dict[str, float]) -> DataProto:
        trainer, actor = self.config.trainer, self.config.actor_rollout_ref.actor
        batch, unbalance = balance(batch, actor.ppo_mini_batch_size, trainer.ranks, trainer.balance_batch)
        metrics |= unbalance
        return batch

    def _compute_advantages(self, batch: DataProto, kl_adapts: bool) -> dict[str, float]:
        task = None if self.task_reward is None else self.score_task(batch)
        return reward_answers(batch, self.config.algorithm, self.kl_ctrl, task, self.eos_token_ids, kl_adapts)

    def score_task(self, batch: DataProto) -> torch.Tensor:
        """The user's reward of every answer, (B, N)."""
        texts = self.decode(batch.batch["responses"], batch.batch["response_mask"])
        prompts, teachers, rows = (batch.non_tensor_batch[key] for key in ("raw_prompt", "teacher_text", "index"))
        return self.task_reward(prompts, texts, teachers, rows)

    def _sft_anchor_coef(self) -> float:
        """The weight of the teacher's answers in this step's policy update."""
        actor = self.config.actor_rollout_ref.actor
        start, end = actor.sft_anchor_coef, actor.sft_anchor_end_coef
        done = self.global_step / max(1, self.total_steps - 1)
        return start if end is None else start + (end - start) * done

    def _update_actor(self, batch: DataProto, keys: tuple[str, ...], sft_anchor_coef: float = 0.0) -> dict[str, float]:
        self._engine_is_current = False
        rows = self.take(batch, PROMPT_KEYS + keys + (TEACHER_KEYS if sft_anchor_coef > 0 else ()))
        rows.meta_info = {ANCHOR_COEF: sft_anchor_coef}
        return self.actor_rollout.update_actor(rows)[0]

    def _check_sync(self, batch: DataProto, metrics: dict[str, float]) -> None:
        """Compare the engine's log-probs with the trainer's where the engine reported them; warn if they part.

        The entropy is that of the same answers, or of all, if all have log-probs already; an update that sees them
        all for the first time knows better.
        """
        if "entropys" in batch.batch:
            metrics["actor/entropy"] = masked_mean(batch.batch["entropys"], batch.batch["response_mask"]).item()
        reported = batch.select_idxs(batch.batch["rollout_log_probs_mask"].bool())
        if len(reported) == 0:
            return
        if "old_log_probs" not in reported.batch:
            answers = self.take(reported, PROMPT_KEYS + STUDENT_KEYS)
            reported.union(self.actor_rollout.compute_log_prob(answers))
            metrics["actor/entropy"] = masked_mean(reported.batch["entropys"], reported.batch["response_mask"]).item()
        gap = compute_sync_metrics(reported)
        metrics |= gap
        tolerance = self.config.actor_rollout_ref.rollout.sync_check_tolerance
        if gap["training/rollout_probs_diff_mean"] > tolerance:
            logger.warning(
                "step %d: the engine's token probabilities differ from the trainer's by %.4f on average (tolerance "
                "%.4f): the engine does not run on the trained weights, or computes something else with them",
                self.global_step, gap["training/rollout_probs_diff_mean"], tolerance,
            )  # fmt: skip

    def _sampled_rouge(self, batch: DataProto) -> float:
        answers = self.decode(batch.batch["responses"], batch.batch["response_mask"])
        teachers = batch.non_tensor_batch["teacher_text"].repeat(len(answers) // len(batch)).tolist()
        return mean_rouge_l(answers, teachers)

    def decode(self, responses: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Texts of answers (B, N, T), row after row, without special tokens and the EOS that closes them."""
        mask = mask.bool() & ~closing_eos(responses, mask, self.eos_token_ids)
        rows = zip(responses.flatten(0, 1), mask.flatten(0, 1), strict=True)
        return self.tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)

    # ------------------------------------------------------------ around the loop

    def _validate(self, tracking: Tracking) -> dict[str, float]:
        metrics = validate(self, tracking, VALIDATION_SEED)
        return metrics | self.held_out.score() if self.held_out is not None else metrics

    def _resume(self) -> None:
        folder = self.checkpoints.find()
        if folder is None:
            return
        state = self.checkpoints.load(folder)
        if self.discriminator is not None:
            self.discriminator.replay.load(folder / REPLAY_FILE)
            self.discriminator.balance.accuracy = state.d_acc
        if self.held_out is not None:
            self.held_out.load(folder / HELD_OUT_FILE)
        if self.rejected is not None:
            self.rejected.load(folder / REJECTED_FILE)
        self.global_step, self.samples_seen = state.global_step, state.samples_seen
        if self.head_start.auto:
            self.head_start.first_actor_step, self.head_start.held = state.first_actor_step, state.head_start_held
        if isinstance(self.kl_ctrl, AdaptiveKLController):
            self.kl_ctrl.value = state.kl_coef
        if self.best is not None:
            self.best.load(state.best)
            self.checkpoints.restore_best(self.best.state)
        self._engine_is_current = False
        if self.global_step >= self.total_steps:
            logger.info("%d of %d steps are done already: nothing is left to train", self.global_step, self.total_steps)

    def save(self, step: int, only_as_best: bool = False) -> None:
        """Write `global_step_N` of the present weights, which `step` updates made; between steps or at a step's end."""
        self.checkpoints.publish(self.write_checkpoint(step, only_as_best))

    def write_checkpoint(self, step: int, only_as_best: bool = False) -> RunState:
        """The same, all but its name; returns what to publish."""
        state = RunState(
            global_step=step,
            samples_seen=self.samples_seen + (step - self.global_step) * self.config.data.train_batch_size,
            kl_coef=self.kl_ctrl.value,
            best=None if self.best is None else self.best.state,
            d_acc=None if self.discriminator is None else self.discriminator.balance.accuracy,
            **self.head_start.state(),
        )
        with self.checkpoints.write(state, only_as_best) as folder:
            if self.discriminator is not None:
                self.discriminator.replay.save(folder / REPLAY_FILE)
            if self.held_out is not None:
                self.held_out.save(folder / HELD_OUT_FILE)
            if self.rejected is not None:
                self.rejected.save(folder / REJECTED_FILE)
        return state

    def _open_tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger,
            config=asdict(self.config),
            log_dir=trainer.default_local_dir,
            resumed=self.global_step > 0,
            # A look at an earlier checkpoint makes no step again.
            first_step=None if trainer.val_only else self.global_step,
            tensorboard_dir=trainer.default_tensorboard_dir,
        )

    def _step_metrics(self, batch: DataProto, timing: dict[str, float]) -> dict[str, float]:
        rows_seen = self.samples_seen + len(batch)
        if self.config.trainer.rollout_data_dir is not None and "responses" in batch.batch:
            self._dump_rollouts(batch, Path(self.config.trainer.rollout_data_dir) / f"{self.global_step}.jsonl")
        return {
            **compute_timing_metrics(batch, timing),
            **compute_throughout_metrics(batch, timing, self.config.trainer.ranks),
            **self._peak_memory(),
            "perf/cpu_memory_used_gb": psutil.virtual_memory().used / 2**30,
            "training/global_step": self.global_step,
            "training/epoch": rows_seen / len(self.train_dataset),
        }

    def _peak_memory(self) -> dict[str, float]:
        """The most that any rank's GPU held since the last call; empty on CPU."""
        reports = self.actor_rollout.peak_memory()
        return {name: max(report[name] for report in reports) for name in reports[0]}

    def _dump_rollouts(self, batch: DataProto, path: Path) -> None:
        answers = self.decode(batch.batch["responses"], batch.batch["response_mask"])
        per_prompt = len(answers) // len(batch)
        rows: list[dict[str, Any]] = []
        for row, teacher in enumerate(batch.non_tensor_batch["teacher_text"]):
            entry = {"index": int(batch.non_tensor_batch["index"][row]), "teacher": teacher}
            entry["answers"] = answers[row * per_prompt : (row + 1) * per_prompt]
            if "student_scores" in batch.batch:
                entry["scores"] = batch.batch["student_scores"][row].tolist()
                entry["teacher_score"] = batch.batch["teacher_scores"][row].item()
            rows.append(entry)
        dump_jsonl(path, rows)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.total_steps, initial=self.global_step, desc=self.config.stage, unit="step", dynamic_ncols=True
        )

    def _show(self, progress: tqdm, metrics: dict[str, float]) -> None:
        shown = {label: f"{metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics}
        progress.set_postfix(shown, refresh=False)
        progress.update()
