"""The discriminator on one rank: scores of answers, and its update on groups.

A group is one prompt with its teacher answer and its N student answers. Groups are never split: a micro-batch holds
whole ones, and the teacher's answer goes through the model once, however many students it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from verl.models.heads import ScoreModel
from verl.models.packing import AnswerRows
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import PairScores, get_discriminator_loss_fn, score_mask
from verl.workers.batch import student_rows, teacher_rows
from verl.workers.config import CriticConfig
from verl.workers.updates import (
    MetricSums,
    data_parallel_size,
    optimizer_step,
    split_micro_batches,
    sum_over_ranks,
)


class DataParallelPPOCritic:
    """The discriminator's computations. Losses are normalised by the pairs of the whole mini-batch over all ranks."""

    def __init__(
        self,
        config: CriticConfig,
        critic_module: ScoreModel,
        critic_optimizer: torch.optim.Optimizer | None,
        eos_token_id: int,
    ):
        self.config = config
        self.critic_module = critic_module
        self.critic_optimizer = critic_optimizer
        self.eos_token_id = eos_token_id
        self.loss = get_discriminator_loss_fn(config.discriminator.loss)
        self.pooling = config.discriminator.pooling or self.loss.pooling

    @torch.no_grad()
    def compute_values(self, data: DataProto) -> torch.Tensor:
        """Values per token of the student's answers, (B, N, T), or of the teacher's, (B, T), with
        `meta_info["compute_teacher"]=True`."""
        teacher = data.meta_info.get("compute_teacher", False)
        rows = teacher_rows(data) if teacher else student_rows(data)
        values = torch.zeros(rows.responses.shape)
        for index in self._micro_batches(rows.lengths(), group_size=1):
            values[index] = self.critic_module(rows.select(index))
        return values.view(data.batch["teacher_response" if teacher else "responses"].shape)

    @torch.no_grad()
    def compute_scores(self, data: DataProto) -> dict[str, torch.Tensor]:
        """Scores as the loss pools them: `student_scores` (B, N) and `teacher_scores` (B, 1), the raw sums beside
        them, and the number of tokens each score is pooled over."""
        student_shape = data.batch["responses"].shape[:2]
        names = ("scores", "raw_scores", "score_tokens")
        result = {f"student_{name}": torch.zeros(student_shape) for name in names}
        result |= {f"teacher_{name}": torch.zeros(student_shape[0], 1) for name in names}
        for index, scores, tokens in self._score_groups(data):
            result["student_scores"][index], result["teacher_scores"][index] = scores.student, scores.teacher
            result["student_raw_scores"][index] = scores.student_raw
            result["teacher_raw_scores"][index] = scores.teacher_raw
            result["student_score_tokens"][index], result["teacher_score_tokens"][index] = tokens
        return result

    def update_critic(self, data: DataProto) -> dict[str, float]:
        """Train on this rank's groups: `ppo_epochs` times over mini-batches of `ppo_mini_batch_size` groups.

        Returns:
            `critic/d_loss`, its parts and `critic/grad_norm`, over all mini-batches and ranks.
        """
        metrics = MetricSums()
        groups_per_rank = self.config.ppo_mini_batch_size // data_parallel_size()
        for _ in range(self.config.ppo_epochs):
            for mini_batch in data.split(groups_per_rank):
                self._accumulate_gradients(mini_batch, metrics)
                norm = optimizer_step(self.critic_module, self.critic_optimizer, self.config.grad_clip)
                metrics.add({"critic/grad_norm": norm}, 1.0)
        return metrics.means()

    def _accumulate_gradients(self, mini_batch: DataProto, metrics: MetricSums) -> None:
        (all_groups,) = sum_over_ranks([float(len(mini_batch))])
        self.critic_optimizer.zero_grad()
        for index, scores, _ in self._score_groups(mini_batch):
            loss, parts = self.loss.fn(scores, **self.config.discriminator.constants())
            # The loss is a mean over this part's pairs; every group has as many.
            (loss * (len(index) / all_groups * data_parallel_size())).backward()
            means = {"critic/d_loss": loss, **parts}
            metrics.add({name: value.detach() for name, value in means.items()}, float(len(index)))

    def _score_groups(
        self, data: DataProto
    ) -> Iterator[tuple[list[int], PairScores, tuple[torch.Tensor, torch.Tensor]]]:
        """Forward whole groups, micro-batch by micro-batch, students and teachers in one pass.

        Yields the groups' indices, their scores, and the tokens behind each student and teacher score.
        """
        students, teachers = student_rows(data), teacher_rows(data)
        groups, answers = data.batch["responses"].shape[:2]
        tokens = torch.tensor(students.lengths()).view(groups, answers).sum(-1) + torch.tensor(teachers.lengths())
        for index in self._micro_batches(tokens.tolist(), group_size=answers + 1):
            members = (torch.tensor(index).unsqueeze(-1) * answers + torch.arange(answers)).flatten()
            rows = AnswerRows.join([students.select(members), teachers.select(index)])
            values = self.critic_module(rows)
            mask = score_mask(
                rows.responses, rows.response_mask, self.eos_token_id, self.config.discriminator.exclude_eos
            )
            split, width = len(members), values.shape[-1]
            scores = PairScores.pool(
                values[:split].view(-1, answers, width),
                values[split:].view(-1, 1, width),
                mask[:split].view(-1, answers, width),
                mask[split:].view(-1, 1, width),
                self.pooling,
            )
            counts = mask.sum(-1).float()
            yield index, scores, (counts[:split].view(-1, answers), counts[split:].view(-1, 1))

    def _micro_batches(self, lengths: list[int], group_size: int) -> list[list[int]]:
        size = self.config.ppo_micro_batch_size_per_gpu
        return split_micro_batches(
            lengths,
            self.config.use_dynamic_bsz,
            self.config.ppo_max_token_len_per_gpu,
            None if size is None else max(1, size // group_size),
        )
