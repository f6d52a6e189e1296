"""The policy on pairs: a prompt's teacher answer, chosen, and the student's own, rejected (SODA, arXiv 2604.03873).

A pair is two neighbouring rows, which share their prompt, and is never split: a micro-batch holds whole pairs.
Log-probs are the model's own, at temperature 1, whatever temperature the answers were sampled at.
"""

from __future__ import annotations

import torch

from verl.batch import PAIR_REFERENCE_KEYS, pair_rows
from verl.config import SodaConfig
from verl.models.packing import AnswerRows, copy_to
from verl.models.sharding import reshard, with_gradient_sync
from verl.protocol import DataProto
from verl.trainer.ppo.preference_algos import compute_preference_loss
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.updates import (
    MetricSums,
    Work,
    data_parallel_size,
    split_micro_batches,
    step_or_skip,
    sum_over_shares,
)


class PairPolicy:
    """The computations of a policy, or a frozen reference, on pairs: one student answer per prompt in every batch.

    The loss is a mean over the pairs of the whole mini-batch over all ranks, so gradients do not depend on how pairs
    are split into micro-batches and ranks.
    """

    def __init__(self, actor: DataParallelPPOActor):
        self.actor = actor
        self.module = actor.actor_module
        # Of the last update.
        self.work = Work()

    @torch.no_grad()
    def compute_log_prob(self, data: DataProto) -> dict[str, torch.Tensor]:
        """`chosen_ref_log_prob` and `rejected_ref_log_prob` (B,): sums over each answer's tokens."""
        rows, settings = pair_rows(data), self.actor.rollout_config
        micro_batches = self._split(
            rows,
            settings.log_prob_use_dynamic_bsz,
            settings.log_prob_max_token_len_per_gpu,
            settings.log_prob_micro_batch_size_per_gpu,
        )
        parts = [self._log_probs(select_pairs(rows, index)) for index in micro_batches]
        reshard(self.module)
        # Results are fetched from the device once all of its work is queued.
        sums = torch.zeros(len(data), 2)
        for index, part in zip(micro_batches, parts, strict=True):
            sums[index] = part.cpu()
        return dict(zip(PAIR_REFERENCE_KEYS, sums.unbind(-1), strict=True))

    def update(self, data: DataProto, soda: SodaConfig) -> dict[str, float]:
        """Train on this rank's pairs: `ppo_epochs` times over mini-batches of `ppo_mini_batch_size` prompts.

        Returns:
            metrics over all mini-batches and ranks.
        """
        config, metrics, self.work = self.actor.config, MetricSums(), Work()
        for _ in range(config.ppo_epochs):
            for mini_batch in data.split(config.ppo_mini_batch_size // data_parallel_size(self.module)):
                loss = self._accumulate_gradients(mini_batch, soda, metrics)
                step_or_skip("actor", self.module, self.actor.actor_optimizer, config.grad_clip, loss, metrics)
        return metrics.means()

    def _accumulate_gradients(self, mini_batch: DataProto, soda: SodaConfig, metrics: MetricSums) -> torch.Tensor:
        """Add up the gradients of a mini-batch; returns this rank's loss."""
        rows, config, device = pair_rows(mini_batch), self.actor.config, self.module.device
        self.work.add(rows)
        references = torch.stack([mini_batch.batch[key] for key in PAIR_REFERENCE_KEYS], dim=-1)
        (all_pairs,) = sum_over_shares([float(len(mini_batch))], self.module)
        micro_batches = self._split(
            rows, config.use_dynamic_bsz, config.ppo_max_token_len_per_gpu, config.ppo_micro_batch_size_per_gpu
        )
        self.actor.actor_optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for index in with_gradient_sync(self.module, micro_batches, config.fsdp_config.sync_gradients_once):
            micro = select_pairs(rows, index)
            loss, means = self._loss(micro, copy_to(references[index], device), soda)
            # The loss is a mean over this part's pairs.
            share = loss * (len(index) / all_pairs * data_parallel_size(self.module))
            share.backward()
            total += share.detach()
            metrics.add(means, float(len(index)))
        return total

    def _loss(
        self, rows: AnswerRows, references: torch.Tensor, soda: SodaConfig
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of B pairs (2B rows), given the reference's sums (B, 2), and metrics as means over the pairs."""
        log_probs = self._log_probs(rows)
        lengths = copy_to(rows.response_mask.sum(-1).view(-1, 2), log_probs.device)
        scale = 1 / lengths if soda.length_normalized else 1.0
        loss, means = compute_preference_loss(
            *(log_probs * scale).unbind(-1), *(references * scale).unbind(-1), soda.beta
        )
        if soda.sft_coef > 0:
            sft_loss = -(log_probs[:, 0] / lengths[:, 0]).mean()
            loss = loss + soda.sft_coef * sft_loss
            means = {**means, "actor/sft_loss": sft_loss.detach()}
        return loss, means

    def _log_probs(self, rows: AnswerRows) -> torch.Tensor:
        """(B, 2), the sums of log-probs of each pair's chosen and rejected answer."""
        log_probs, _ = self.module(rows)
        return log_probs.sum(-1).view(-1, 2)

    def _split(self, rows: AnswerRows, dynamic: bool, max_tokens: int, size: int | None) -> list[list[int]]:
        """Pairs of each micro-batch; a prompt that the module computes once counts once."""
        tokens = torch.tensor(rows.lengths()).view(-1, 2).sum(-1)
        if self.module.remove_padding:
            tokens -= rows.prompt_mask.sum(-1)[::2]
        max_tokens *= self.module.sequence_parallel_size
        return split_micro_batches(tokens.tolist(), dynamic, max_tokens, None if size is None else max(1, size // 2))


def select_pairs(rows: AnswerRows, pairs: list[int]) -> AnswerRows:
    """The rows of the given pairs."""
    return rows.select([row for pair in pairs for row in (2 * pair, 2 * pair + 1)])
