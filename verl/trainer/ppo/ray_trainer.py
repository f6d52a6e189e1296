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
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.trainer.config.schema import Config
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.trainer.ppo.core_algos import (
    AdaptiveKLController,
    FixedKLController,
    get_adv_estimator_fn,
    get_kl_controller,
    kl_penalty,
)
from verl.trainer.ppo.metric_utils import (
    compute_data_metrics,
    compute_discriminator_metrics,
    compute_sync_metrics,
    compute_throughout_metrics,
    compute_timing_metrics,
)
from verl.trainer.ppo.resource_pools import ResourcePoolManager
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.validation import validate
from verl.utils.dataset.sampler import EpochBatches
from verl.utils.dump import write_jsonl
from verl.utils.rouge import mean_rouge_l
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions, log_seqlen_unbalance
from verl.utils.torch_functional import masked_mean
from verl.utils.tracking import Tracking
from verl.workers.batch import POLICY_KEYS, PROMPT_KEYS, STUDENT_KEYS, TEACHER_KEYS
from verl.workers.config import SamplingConfig

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

# Far from the seeds of training steps, so that validation never replays their draws.
VALIDATION_SEED = 1_000_003
# What the progress bar shows, where a step has it.
SHOWN = {
    "actor/sft_loss": "loss",
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


def apply_kl_penalty(
    data: DataProto, kl_ctrl: FixedKLController | AdaptiveKLController, kl_penalty_type: str = "kl"
) -> tuple[DataProto, dict[str, float]]:
    """Make `token_level_rewards` from `token_level_scores` less the controller's share of the KL to the reference.

    The controller then adapts to the mean KL per token of this batch's answers. All tensors (B, N, T).
    """
    mask = data.batch["response_mask"]
    kl = kl_penalty(data.batch["old_log_probs"], data.batch["ref_log_prob"], kl_penalty_type) * mask
    coefficient = kl_ctrl.value
    data.batch["token_level_rewards"] = data.batch["token_level_scores"] - coefficient * kl
    current = (kl.sum(-1) / mask.sum(-1).clamp(min=1)).mean().item()
    kl_ctrl.update(current_kl=current, n_steps=mask[..., 0].numel())
    return data, {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": coefficient}


def compute_advantage(data: DataProto, adv_estimator: str, norm_adv_by_std_in_grpo: bool = True) -> DataProto:
    """Add `advantages` and `returns` (B, N, T); the answers in one row are one group."""
    rewards, mask = data.batch["token_level_rewards"], data.batch["response_mask"]
    groups = np.repeat(np.arange(len(data)), rewards.shape[1])
    advantages, returns = get_adv_estimator_fn(adv_estimator)(
        token_level_rewards=rewards.flatten(0, 1),
        response_mask=mask.flatten(0, 1),
        index=groups,
        norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo,
    )
    data.batch["advantages"], data.batch["returns"] = advantages.view_as(rewards), returns.view_as(rewards)
    return data


class RayPPOTrainer:
    """Runs one stage: SeqKD, warmup or GAD, as the configuration says.

    Args:
        config: the whole run's settings.
        tokenizer: the student's.
        role_worker_mapping: worker class of each role.
        resource_pool_manager: where the roles run.
        train_dataset, val_dataset: rows as `RLHFDataset` gives them; no `val_dataset`, no validation.
        collate_fn: makes one dict of tensors and object arrays of a list of rows.
    """

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
        self.global_step = 0
        self.samples_seen = 0
        self.total_steps = self._count_steps()
        self._engine_is_current = True

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
        if self.config.trainer.critic_warmup >= steps:
            logger.warning(
                "trainer.critic_warmup=%d covers all %d steps: only the discriminator will be trained",
                self.config.trainer.critic_warmup, steps,
            )  # fmt: skip
        return steps

    # ------------------------------------------------------------ workers

    def init_workers(self) -> None:
        """Start one process per rank with every role in it, and build the models there."""
        config = self.config
        common = {"device": config.trainer.device, "seed": config.data.seed}
        frozen = max(0, config.trainer.critic_warmup)
        roles = {
            str(Role.ActorRollout): RayClassWithInitArgs(
                self.role_worker_mapping[Role.ActorRollout],
                config.actor_rollout_ref,
                use_reference=config.use_reference,
                total_steps=max(1, self.total_steps - frozen),
                **common,
            )
        }
        if config.use_critic:
            roles[str(Role.Critic)] = RayClassWithInitArgs(
                self.role_worker_mapping[Role.Critic], config.critic, total_steps=self.total_steps, **common
            )
        pools = self.resource_pool_manager.create_resource_pool()
        pool = pools[self.resource_pool_manager.mapping[Role.ActorRollout]]
        groups = RayWorkerGroup(pool, create_colocated_worker_cls(roles)).spawn(roles)
        logger.info("%d ranks are up; building models", self.config.trainer.ranks)
        self.actor_rollout = groups[str(Role.ActorRollout)]
        self.critic = groups.get(str(Role.Critic))
        self.actor_rollout.init_model()
        if self.critic is not None:
            self.critic.init_model()
        self.checkpoints = Checkpoints(config.trainer, self.actor_rollout, self.critic)

    # ------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way; resumes where a checkpoint was left."""
        config = self.config.trainer
        self._resume()
        with self._open_tracking() as tracking, self._progress() as progress:
            if config.val_only:
                return tracking.log(self._validate(tracking), self.global_step)
            for batch in self._batches():
                metrics, timing = {}, {}
                if self._validation_is_due():
                    with marked_timer("testing", timing):
                        metrics |= self._validate(tracking)
                with marked_timer("step", timing):
                    step = self._sft_step if self.config.use_sft else self._adversarial_step
                    batch = step(batch, metrics, timing)
                done = self.global_step + 1
                if done == self.total_steps or (config.save_freq > 0 and done % config.save_freq == 0):
                    with marked_timer("save_checkpoint", timing):
                        self._save(done)
                metrics |= self._step_metrics(batch, timing)
                tracking.log(metrics, self.global_step)
                self._show(progress, metrics)
                self.global_step = done
            if config.test_freq > 0 and self.val_dataset is not None:
                tracking.log(self._validate(tracking), self.global_step)

    def _sft_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """SeqKD: one update on the teacher's answers. The student's are sampled for monitoring only."""
        batch = self._balance(batch, self.config.actor_rollout_ref.actor.ppo_mini_batch_size, metrics)
        frequency = self.config.trainer.sft_monitor_freq
        if self._due(self.config.trainer.test_freq if frequency is None else frequency):
            with marked_timer("gen", timing):
                self._generate(batch)
            with marked_timer("old_log_prob", timing):
                self._check_sync(batch, metrics)
            metrics["train/rouge-L/mean"] = self._sampled_rouge(batch)
        with marked_timer("update_actor", timing):
            metrics |= self._update_actor(batch, TEACHER_KEYS)
        metrics |= compute_data_metrics(batch, use_critic=False)
        return batch

    def _adversarial_step(self, batch: DataProto, metrics: dict[str, float], timing: dict[str, float]) -> DataProto:
        """Warmup and GAD: answers, their log-probs and scores, advantages, then both updates."""
        config = self.config
        with marked_timer("gen", timing):
            self._generate(batch)
        batch = self._balance(batch, config.actor_rollout_ref.actor.ppo_mini_batch_size, metrics)
        answers = PROMPT_KEYS + STUDENT_KEYS
        with marked_timer("old_log_prob", timing):
            batch.union(self.actor_rollout.compute_log_prob(self.take(batch, answers)))
        if config.use_reference:
            with marked_timer("ref", timing):
                batch.union(self.actor_rollout.compute_ref_log_prob(self.take(batch, answers)))
        with marked_timer("values", timing):
            batch.union(self.critic.compute_scores(self.take(batch, answers + TEACHER_KEYS)))
        with marked_timer("adv", timing):
            metrics |= self._compute_advantages(batch)
        with marked_timer("update_critic", timing):
            metrics |= self._update_critic(batch, answers + TEACHER_KEYS)
        if config.trainer.critic_warmup <= self.global_step:
            with marked_timer("update_actor", timing):
                metrics |= self._update_actor(batch, STUDENT_KEYS + POLICY_KEYS)
        metrics |= compute_data_metrics(batch) | compute_discriminator_metrics(batch)
        self._check_sync(batch, metrics)
        return batch

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
        if not self._engine_is_current:
            self.actor_rollout.push_weights()
            self._engine_is_current = True
        prompts = self.take(batch, PROMPT_KEYS)
        prompts.meta_info = {"sampling": sampling, "seed": seed, "report_log_probs": report_log_probs}
        return self.actor_rollout.generate_sequences(prompts)

    def _balance(self, batch: DataProto, mini_batch_size: int, metrics: dict[str, float]) -> DataProto:
        """Order rows so that each rank's share of every mini-batch has about as many tokens as the others'.

        A mini-batch is the same set of rows for any number of ranks: consecutive rows of the data's order, which
        `data_order` keeps.
        """
        if "data_order" in batch.batch:
            batch = batch.select_idxs(batch.batch["data_order"].argsort())
        batch.batch["data_order"] = torch.arange(len(batch))
        ranks, size = self.config.trainer.ranks, mini_batch_size
        tokens = batch.batch["teacher_attention_mask"].sum(-1)
        if "response_mask" in batch.batch:
            mask = batch.batch["response_mask"]
            tokens = tokens + batch.batch["attention_mask"].sum(-1) * mask.shape[1] + mask.sum((1, 2))
        lengths = tokens.tolist()
        shares: list[list[int]] = [[] for _ in range(ranks)]
        for start in range(0, len(batch), size):
            rows = np.arange(start, min(start + size, len(batch)))
            parts = np.split(np.arange(len(rows)), ranks)
            if self.config.trainer.balance_batch:
                parts = get_seqlen_balanced_partitions([lengths[row] for row in rows], ranks, equal_size=True)
            for share, part in zip(shares, parts, strict=True):
                share.extend(rows[part].tolist())
        metrics |= log_seqlen_unbalance(lengths, shares, "global_seqlen")
        return batch.select_idxs(np.concatenate(shares))

    def _compute_advantages(self, batch: DataProto) -> dict[str, float]:
        """Scores on each answer's last token, less the KL penalty if it is in the reward, then advantages."""
        algorithm, metrics = self.config.algorithm, {}
        mask = batch.batch["response_mask"]
        last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
        scores = torch.zeros(mask.shape).scatter(-1, last, batch.batch["student_scores"].unsqueeze(-1))
        batch.batch["token_level_scores"] = scores
        if algorithm.use_kl_in_reward:
            _, metrics = apply_kl_penalty(batch, self.kl_ctrl, algorithm.kl_penalty)
        else:
            batch.batch["token_level_rewards"] = scores
        compute_advantage(batch, algorithm.adv_estimator, algorithm.norm_adv_by_std_in_grpo)
        metrics["actor/entropy"] = masked_mean(batch.batch["entropys"], mask).item()
        return metrics

    def _update_actor(self, batch: DataProto, keys: tuple[str, ...]) -> dict[str, float]:
        self._engine_is_current = False
        return self.actor_rollout.update_actor(self.take(batch, PROMPT_KEYS + keys))[0]

    def _update_critic(self, batch: DataProto, keys: tuple[str, ...]) -> dict[str, float]:
        size = self.config.critic.ppo_mini_batch_size
        if size != self.config.actor_rollout_ref.actor.ppo_mini_batch_size:
            batch = self._balance(batch, size, metrics={})
        return self.critic.update_critic(self.take(batch, keys))[0]

    def _check_sync(self, batch: DataProto, metrics: dict[str, float]) -> None:
        """Compare the engine's log-probs with the trainer's where the engine reported them; warn if they part."""
        reported = batch.select_idxs(batch.batch["rollout_log_probs_mask"].bool())
        if len(reported) == 0:
            return
        if "old_log_probs" not in reported.batch:
            answers = self.take(reported, PROMPT_KEYS + STUDENT_KEYS)
            reported.union(self.actor_rollout.compute_log_prob(answers))
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
        teachers = np.repeat(batch.non_tensor_batch["teacher_text"], len(answers) // len(batch)).tolist()
        return mean_rouge_l(answers, teachers)

    def decode(self, responses: torch.Tensor, mask: torch.Tensor) -> list[str]:
        """Texts of answers (B, N, T), row after row, without special tokens."""
        rows = zip(responses.flatten(0, 1), mask.flatten(0, 1).bool(), strict=True)
        return self.tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)

    # ------------------------------------------------------------ around the loop

    def _validate(self, tracking: Tracking) -> dict[str, float]:
        return validate(self, tracking, VALIDATION_SEED)

    def _resume(self) -> None:
        state = self.checkpoints.resume()
        if state is None:
            return
        self.global_step, self.samples_seen = state.global_step, state.samples_seen
        if isinstance(self.kl_ctrl, AdaptiveKLController):
            self.kl_ctrl.value = state.kl_coef
        self._engine_is_current = False
        if self.global_step >= self.total_steps:
            logger.info("%d of %d steps are done already: nothing is left to train", self.global_step, self.total_steps)

    def _save(self, step: int) -> None:
        seen = self.samples_seen + self.config.data.train_batch_size
        self.checkpoints.save(RunState(global_step=step, samples_seen=seen, kl_coef=self.kl_ctrl.value))

    def _open_tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger,
            config=asdict(self.config),
            log_dir=trainer.default_local_dir,
            resumed=self.global_step > 0,
            tensorboard_dir=trainer.default_tensorboard_dir,
        )

    def _step_metrics(self, batch: DataProto, timing: dict[str, float]) -> dict[str, float]:
        rows_seen = self.samples_seen + len(batch)
        if self.config.trainer.rollout_data_dir is not None and "responses" in batch.batch:
            self._dump_rollouts(batch, Path(self.config.trainer.rollout_data_dir) / f"{self.global_step}.jsonl")
        return {
            **compute_timing_metrics(batch, timing),
            **compute_throughout_metrics(batch, timing, self.config.trainer.ranks),
            "perf/cpu_memory_used_gb": psutil.virtual_memory().used / 2**30,
            "training/global_step": self.global_step,
            "training/epoch": rows_seen / len(self.train_dataset),
        }

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
        write_jsonl(path, rows)

    def _progress(self) -> tqdm:
        warming_up = self.config.trainer.critic_warmup > 0
        stage = "SeqKD" if self.config.use_sft else "warmup" if warming_up else "GAD"
        return tqdm(total=self.total_steps, initial=self.global_step, desc=stage, unit="step", dynamic_ncols=True)

    def _show(self, progress: tqdm, metrics: dict[str, float]) -> None:
        shown = {label: f"{metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics}
        progress.set_postfix(shown, refresh=False)
        progress.update()
