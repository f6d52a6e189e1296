"""The policy on one rank: log-probs of answers, and its update by SFT or by a policy loss."""

from __future__ import annotations

from typing import Any

import torch

from verl.batch import ANCHOR_COEF, POLICY_KEYS, UpdateRows, student_rows, teacher_rows, update_rows
from verl.config import ActorConfig, RolloutConfig
from verl.models.answer_models import PolicyModel
from verl.models.head_log_probs import Entropy
from verl.models.packing import AnswerRows, copy_to
from verl.models.sharding import reshard, with_gradient_sync
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import agg_loss, compute_sft_loss, get_policy_loss_fn, kl_penalty
from verl.utils.torch_functional import masked_mean
from verl.workers.updates import (
    MetricSums,
    Work,
    data_parallel_size,
    split_rows,
    step_or_skip,
    sum_over_shares,
)


class DataParallelPPOActor:
    """The policy's computations; without an optimizer it is a frozen reference.

    Losses are normalised by the whole mini-batch over all ranks, so gradients do not depend on how rows are split
    into micro-batches and ranks.
    """

    def __init__(
        self,
        config: ActorConfig,
        rollout_config: RolloutConfig,
        actor_module: PolicyModel,
        actor_optimizer: torch.optim.Optimizer | None = None,
    ):
        self.config = config
        self.rollout_config = rollout_config
        self.actor_module = actor_module
        self.actor_optimizer = actor_optimizer
        # Of the last update.
        self.work = Work()

    @property
    def temperature(self) -> float:
        """The policy is the distribution that answers are drawn from, so its log-probs are taken at its temperature."""
        return self.rollout_config.temperature if self.rollout_config.do_sample else 1.0

    def compute_log_prob(self, data: DataProto, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the student's answers, (B, N, T) each, at the sampling temperature.

        Without `entropy` the second is zeros.
        """
        log_probs, entropies = self._log_probs(student_rows(data), self.temperature, "value" if entropy else "none")
        shape = data.batch["responses"].shape
        return log_probs.view(shape), entropies.view(shape)

    def compute_teacher_log_prob(self, data: DataProto) -> torch.Tensor:
        """Log-probs of the teacher's answers, (B, T), at temperature 1, where SFT takes them."""
        return self._log_probs(teacher_rows(data), 1.0, "none")[0]

    @torch.no_grad()
    def _log_probs(
        self, rows: AnswerRows, temperature: float, entropy_mode: Entropy
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of R answers, (R, T) each, zero where there are none."""
        micro_batches = split_rows(
            rows,
            self.actor_module,
            self.rollout_config.log_prob_use_dynamic_bsz,
            self.rollout_config.log_prob_max_token_len_per_gpu,
            self.rollout_config.log_prob_micro_batch_size_per_gpu,
        )
        parts = [self.actor_module(rows.select(index), temperature, entropy_mode) for index in micro_batches]
        reshard(self.actor_module)
        # Results are fetched from the device once all of its work is queued.
        log_probs, entropies = torch.zeros(rows.responses.shape), torch.zeros(rows.responses.shape)
        for index, (log_prob, values) in zip(micro_batches, parts, strict=True):
            log_probs[index] = log_prob.cpu()
            if values is not None:
                entropies[index] = values.cpu()
        return log_probs, entropies

    def update_policy(self, data: DataProto) -> dict[str, float]:
        """Train on this rank's rows: `ppo_epochs` times over mini-batches of `ppo_mini_batch_size` prompts.

        With `use_sft_mode` the teacher's answers are the target, each counted once; otherwise the student's own, with
        `advantages`, `old_log_probs` and, where they are given, `ref_log_prob` for a KL loss and `rollout_is_weights`,
        which each token's policy loss is multiplied by. `meta_info["sft_anchor_coef"]` above 0 adds so
        many times the SFT loss of the teacher's answers, whose prompts are shared (CHORD, arXiv 2508.11408).

        With one mini-batch and one epoch `old_log_probs` may be left out: no weight changes before the last of them
        would be computed, so they are the update's own, detached. `actor/entropy` is then among the metrics.

        Returns:
            metrics over all mini-batches and ranks.
        """
        metrics, self.work = MetricSums(), Work()
        prompts_per_rank = self.config.ppo_mini_batch_size // data_parallel_size(self.actor_module)
        for _ in range(self.config.ppo_epochs):
            for mini_batch in data.split(prompts_per_rank):
                loss = self._accumulate_gradients(mini_batch, metrics)
                clip = self.config.grad_clip
                step_or_skip("actor", self.actor_module, self.actor_optimizer, clip, loss, metrics)
        return metrics.means()

    def _accumulate_gradients(self, mini_batch: DataProto, metrics: MetricSums) -> torch.Tensor:
        """Add up the gradients of a mini-batch; returns this rank's loss."""
        sft, module = self.config.use_sft_mode, self.actor_module
        coef = 0.0 if sft else mini_batch.meta_info.get(ANCHOR_COEF, 0.0)
        update = update_rows(mini_batch, sft, anchor=coef > 0)
        rows, totals = update.rows, self._totals(update)
        self.work.add(rows)
        policy_inputs = {}
        if not sft:
            policy_inputs = {key: mini_batch.batch[key].flatten(0, 1) for key in POLICY_KEYS if key in mini_batch.batch}

        self.actor_optimizer.zero_grad()
        total, losses = torch.zeros((), device=module.device), {}
        micro_batches = split_rows(
            rows,
            module,
            self.config.use_dynamic_bsz,
            self.config.ppo_max_token_len_per_gpu,
            self.config.ppo_micro_batch_size_per_gpu,
        )
        once = self.config.fsdp_config.sync_gradients_once
        for index in with_gradient_sync(module, micro_batches, once):
            micro, student = rows.select(index), update.student[index]
            if sft:
                loss, shares, means = self._sft_loss(micro, totals["teacher"])
            else:
                answers = student[student >= 0]
                given = {key: copy_to(value[answers], module.device) for key, value in policy_inputs.items()}
                loss, shares, means = self._policy_loss(micro, student >= 0, given, totals, coef)
            loss.backward()
            total += loss.detach()
            for side, values in means.items():
                metrics.add(values, float(micro.response_mask[(student >= 0) == (side == "student")].sum()))
            for name, share in shares.items():
                losses[name] = losses.get(name, 0) + share
        # The shares carry their weight already: summed over micro-batches they are the mini-batch's loss.
        metrics.add(losses, 1.0)
        if coef > 0:
            metrics.add({"actor/sft_anchor_coef": coef}, 1.0)
        return total

    def _totals(self, update: UpdateRows) -> dict[str, dict[str, float]]:
        """The sizes of the mini-batch over all ranks that `agg_loss` needs, for the students' answers and the
        teachers'."""
        students = update.student >= 0
        counts = []
        for side in (students, ~students):
            counts += [float(update.rows.response_mask[side].sum()), float(side.sum())]
        tokens, sequences, teacher_tokens, teacher_sequences = sum_over_shares(counts, self.actor_module)
        size = data_parallel_size(self.actor_module)
        return {
            "student": {"dp_size": size, "batch_num_tokens": tokens, "global_batch_size": sequences},
            "teacher": {"dp_size": size, "batch_num_tokens": teacher_tokens, "global_batch_size": teacher_sequences},
        }

    def _sft_loss(self, rows: AnswerRows, totals: dict[str, Any]) -> tuple[torch.Tensor, dict, dict]:
        mask = copy_to(rows.response_mask, self.actor_module.device)
        log_prob, entropy = self.actor_module(rows, entropy="value")
        loss = compute_sft_loss(log_prob, mask, self.config.loss_agg_mode, **totals)
        shares = {"actor/sft_loss": loss.detach(), "actor/teacher_pg_loss": loss.detach()}
        return loss, shares, {"teacher": {"actor/entropy": masked_mean(entropy, mask)}}

    def _policy_loss(
        self,
        rows: AnswerRows,
        is_student: torch.Tensor,
        policy_inputs: dict[str, torch.Tensor],
        totals: dict,
        coef: float,
    ) -> tuple[torch.Tensor, dict, dict]:
        """The students' answers by the policy loss at the sampling temperature and, where there are teachers' among the
        rows, `coef` times their SFT loss at temperature 1, in one forward."""
        config, device = self.config, self.actor_module.device
        computes_old = "old_log_probs" not in policy_inputs
        entropy_mode = "grad" if config.entropy_coeff else "value" if computes_old else "none"
        mask = copy_to(rows.response_mask, device)
        if is_student.all():
            log_prob, entropy = self.actor_module(rows, self.temperature, entropy_mode)
            return self._students_loss(log_prob, entropy, mask, policy_inputs, totals["student"])
        temperature = copy_to(torch.where(is_student, self.temperature, 1.0), device)
        log_prob, entropy = self.actor_module(rows, temperature, entropy_mode)
        teachers, students = (copy_to(side.nonzero().flatten(), device) for side in (~is_student, is_student))
        anchor = compute_sft_loss(log_prob[teachers], mask[teachers], config.loss_agg_mode, **totals["teacher"])
        loss, shares, means = coef * anchor, {}, {}
        if is_student.any():
            of_students = (log_prob[students], None if entropy is None else entropy[students], mask[students])
            students_loss, shares, means = self._students_loss(*of_students, policy_inputs, totals["student"])
            loss = loss + students_loss
        return loss, {**shares, "actor/sft_anchor_loss": anchor.detach()}, means

    def _students_loss(
        self,
        log_prob: torch.Tensor,
        entropy: torch.Tensor | None,
        mask: torch.Tensor,
        policy_inputs: dict[str, torch.Tensor],
        totals: dict[str, Any],
    ) -> tuple[torch.Tensor, dict, dict]:
        config = self.config
        computes_old = "old_log_probs" not in policy_inputs
        old_log_prob = log_prob.detach() if computes_old else policy_inputs["old_log_probs"]
        policy_loss = get_policy_loss_fn(config.policy_loss.loss_mode)
        weights = {name: policy_inputs[name] for name in ("rollout_is_weights",) if name in policy_inputs}
        loss, means = policy_loss(
            old_log_prob, log_prob, policy_inputs["advantages"], mask, config.loss_agg_mode, config, **weights, **totals
        )
        if computes_old:
            means = {**means, "actor/entropy": masked_mean(entropy.detach(), mask)}
        shares = {"actor/pg_loss": loss.detach()}
        if config.entropy_coeff != 0:
            loss = loss - config.entropy_coeff * agg_loss(entropy, mask, config.loss_agg_mode, **totals)
        if config.use_kl_loss:
            kl = kl_penalty(log_prob, policy_inputs["ref_log_prob"], config.kl_loss_type)
            kl_loss = agg_loss(kl, mask, config.loss_agg_mode, **totals)
            loss = loss + config.kl_loss_coef * kl_loss
            shares["actor/kl_loss"] = kl_loss.detach()
            divergence = masked_mean((log_prob - policy_inputs["ref_log_prob"]).detach(), mask)
            means = {**means, "actor/kl_divergence": divergence, "actor/kl_coef": config.kl_loss_coef}
        return loss, shares, {"student": means}
