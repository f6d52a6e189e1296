"""The discriminator on one rank: scores of answers, and its update on groups.

A group is one prompt with its teacher answer and its N student answers. Groups are never split: a micro-batch holds
whole ones, and the teacher's answer goes through the model once, however many students it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from verl.batch import student_rows, teacher_rows
from verl.config import CriticConfig
from verl.models.answer_models import ScoreModel
from verl.models.sharding import reshard, with_gradient_sync
from verl.protocol import DataProto
from verl.trainer.ppo.discriminator_algos import (
    PairScores,
    adapted_temperature,
    get_discriminator_loss_fn,
    with_one_eos,
)
from verl.workers.critic.groups import DistinctAnswers, ScoreTable
from verl.workers.updates import (
    MetricSums,
    Work,
    data_parallel_size,
    split_micro_batches,
    split_rows,
    step_or_skip,
    sum_over_shares,
)


class DataParallelPPOCritic:
    """The discriminator's computations. Losses are normalised by the pairs of the whole mini-batch over all ranks."""

    def __init__(
        self,
        config: CriticConfig,
        critic_module: ScoreModel,
        critic_optimizer: torch.optim.Optimizer | None,
        eos_token_id: int | Sequence[int],
    ):
        self.config = config
        self.critic_module = critic_module
        self.critic_optimizer = critic_optimizer
        self.eos_token_id = eos_token_id
        # Of the last update.
        self.work = Work()
        self.loss = get_discriminator_loss_fn(config.discriminator.loss)
        self.pooling = config.discriminator.pooling or self.loss.pooling

    def scoring(self) -> dict[str, str | bool | float]:
        """The settings that make an answer's score of its values (loss, pooling, whether EOS is left out), and the
        temperature where it is constant: the teacher's answer is then the better one with probability
        sigmoid(d / temperature)."""
        settings = self.config.discriminator
        scoring = {"loss": settings.loss, "pooling": self.pooling, "exclude_eos": settings.exclude_eos}
        if "temperature" in settings.constants() and not settings.adaptive_temperature.enable:
            scoring["temperature"] = settings.constants()["temperature"]
        return scoring

    @torch.no_grad()
    def compute_values(self, data: DataProto) -> torch.Tensor:
        """Values per token of the student's answers, (B, N, T), or of the teacher's, (B, T), with
        `meta_info["compute_teacher"]=True`."""
        teacher = data.meta_info.get("compute_teacher", False)
        rows = teacher_rows(data) if teacher else student_rows(data)
        rows = replace(rows, responses=with_one_eos(rows.responses, rows.response_mask, self.eos_token_id))
        micro_batches = split_rows(
            rows,
            self.critic_module,
            self.config.use_dynamic_bsz,
            self.config.ppo_max_token_len_per_gpu,
            self.config.ppo_micro_batch_size_per_gpu,
        )
        parts = [self.critic_module(rows.select(index)) for index in micro_batches]
        reshard(self.critic_module)
        # Results are fetched from the device once all of its work is queued.
        values = torch.zeros(rows.responses.shape)
        for index, part in zip(micro_batches, parts, strict=True):
            values[index] = part.cpu()
        return values.view(data.batch["teacher_response" if teacher else "responses"].shape)

    @torch.no_grad()
    def compute_scores(self, data: DataProto) -> dict[str, torch.Tensor]:
        """The scores of every answer in the batch, pooled for the loss; see `ScoreTable.tensors`."""
        table = ScoreTable(*data.batch["responses"].shape[:2])
        for part in self._score_groups(data):
            table.add(*part)
        reshard(self.critic_module)
        return table.tensors()

    def update_critic(self, data: DataProto) -> dict[str, float]:
        """Train on this rank's groups: `epochs` times over the `meta_info["mini_batches"]` mini-batches in it.

        Returns:
            `critic/d_loss`, its parts and `critic/grad_norm`, over all mini-batches and ranks.
        """
        metrics, self.work = MetricSums(), Work()
        for _ in range(self.epochs(data)):
            for mini_batch in data.split(len(data) // data.meta_info["mini_batches"]):
                self._step(mini_batch, metrics)
        return metrics.means()

    def epochs(self, data: DataProto) -> int:
        """`meta_info["epochs"]` of a batch, or the usual `ppo_epochs`."""
        return data.meta_info.get("epochs", self.config.ppo_epochs)

    def score_and_update(self, data: DataProto) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """`compute_scores` and then one optimizer step on the whole batch, in a single forward.

        The scores are those before the update: with one mini-batch and one epoch no weight changes before the last of
        them is computed.
        """
        metrics, table, self.work = MetricSums(), ScoreTable(*data.batch["responses"].shape[:2]), Work()
        self._step(data, metrics, table)
        return table.tensors(), metrics.means()

    @torch.no_grad()
    def score_and_evaluate(self, data: DataProto) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """`score_and_update` without the update: the scores, and the loss and its parts."""
        metrics, table = MetricSums(), ScoreTable(*data.batch["responses"].shape[:2])
        constants = self._constants(data, metrics)
        for index, scores, tokens in self._score_groups(data):
            loss, parts = self.loss(scores, **constants)
            metrics.add({"critic/d_loss": loss, **parts}, float(len(index)))
            table.add(index, scores, tokens)
        reshard(self.critic_module)
        return table.tensors(), metrics.means()

    def _step(self, mini_batch: DataProto, metrics: MetricSums, table: ScoreTable | None = None) -> None:
        self._count(mini_batch)
        (all_groups,) = sum_over_shares([float(len(mini_batch))], self.critic_module)
        constants = self._constants(mini_batch, metrics)
        self.critic_optimizer.zero_grad()
        total = torch.zeros((), device=self.critic_module.device)
        for index, scores, tokens in self._score_groups(mini_batch):
            loss, parts = self.loss(scores, **constants)
            # The loss is a mean over this part's pairs; every group has as many.
            share = loss * (len(index) / all_groups * data_parallel_size(self.critic_module))
            share.backward()
            total += share.detach()
            means = {"critic/d_loss": loss, **parts}
            metrics.add({name: value.detach() for name, value in means.items()}, float(len(index)))
            if table is not None:
                table.add(index, scores, tokens)
        step_or_skip("critic", self.critic_module, self.critic_optimizer, self.config.grad_clip, total, metrics)

    def _count(self, mini_batch: DataProto) -> None:
        """Every answer counts, those that are alike too; a prompt counts once, with its teacher's answer."""
        prompts, answers = (mini_batch.batch[key].sum(-1) for key in ("attention_mask", "response_mask"))
        self.work.lengths += (prompts.unsqueeze(-1) + answers).flatten().tolist()
        self.work.lengths += mini_batch.batch["teacher_attention_mask"].sum(-1).tolist()
        self.work.repeated += prompts.repeat_interleave(answers.shape[1]).tolist()

    def _constants(self, mini_batch: DataProto, metrics: MetricSums) -> dict[str, Any]:
        """The loss's constants. An adaptive temperature needs the mean difference over the whole mini-batch and all
        ranks before the first gradient, which is one more forward."""
        constants = self.config.discriminator.constants()
        adaptive = self.config.discriminator.adaptive_temperature
        if adaptive.enable:
            with torch.no_grad():
                parts = [scores.difference for _, scores, _ in self._score_groups(mini_batch)]
            difference = torch.cat(parts)
            total, pairs = sum_over_shares([difference.sum().item(), float(difference.numel())], self.critic_module)
            constants["temperature"] = adapted_temperature(
                total / pairs, adaptive.offset, adaptive.slope, adaptive.lowest, adaptive.highest
            )
            metrics.add({"critic/temperature": constants["temperature"]}, 1.0)
        return constants

    def _score_groups(self, data: DataProto) -> Iterator[tuple[list[int], PairScores, torch.Tensor]]:
        """Forward whole groups, micro-batch by micro-batch, students and teachers in one pass.

        Yields the groups' indices, their scores, and the tokens (G, N + 1) behind each, the teacher's last.
        """
        groups = DistinctAnswers.of(data, self.eos_token_id, self.config.discriminator.exclude_eos)
        size = self.config.ppo_micro_batch_size_per_gpu
        micro_batches = split_micro_batches(
            groups.lengths(share_prompts=self.critic_module.remove_padding),
            self.config.use_dynamic_bsz,
            self.config.ppo_max_token_len_per_gpu * self.critic_module.sequence_parallel_size,
            None if size is None else max(1, size // groups.members.shape[1]),
        )
        once = self.config.model.fsdp_config.sync_gradients_once
        for index in with_gradient_sync(self.critic_module, micro_batches, once):
            part = groups.select(index)
            yield index, *part.scores(self.critic_module(part.rows), self.pooling)
