"""Validation: greedy answers to the held-out prompts, their ROUGE-L, and the SFT loss of the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from verl.batch import Answers, Prompts, Scores, table, teacher_response_mask
from verl.config.run import Config
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_sft_loss
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.held_out import HeldOutPairs
from verl.trainer.ppo.metric_utils import compute_length_metrics, mean_max_min
from verl.trainer.ppo.reward import TaskReward, score_task
from verl.trainer.ppo.student import Student
from verl.utils.dump import dump_jsonl
from verl.utils.rouge import rouge_l
from verl.utils.tracking import Sample, Tracking, ValidationGenerationsLogger


class Answered(NamedTuple):
    """One batch of the validation set."""

    prompts: Prompts
    answers: Answers
    teacher_log_probs: torch.Tensor  # (B, T)
    scores: Scores | None


@dataclass(frozen=True)
class Validation:
    """Everything that a validation looks at.

    Args:
        discriminator: scores the answers that are written to `trainer.validation_data_dir`, if there is one.
        held_out: pairs on which the discriminator is measured, if there are any.
        seed: of the draws, where answers are sampled.
    """

    config: Config
    student: Student
    dataset: Dataset
    collate_fn: Callable[[list], dict]
    task_reward: TaskReward | None
    discriminator: Discriminator | None
    held_out: HeldOutPairs | None
    seed: int

    def run(self, step: int, tracking: Tracking) -> dict[str, float]:
        """Answer every held-out prompt and compare with the teacher.

        Returns:
            `val/rouge-L/mean`, `val/sft_loss`, `val/response_length/*`, with a task reward `val/task_reward/*`, and
            with held-out pairs `val/critic/*`.
        """
        parts = list(self._answered())
        samples = [sample for part in parts for sample in self._samples(part)]
        metrics = {"val/rouge-L/mean": float(np.mean([sample.rouge for sample in samples]))}
        answered = DataProto.concat([table(part.prompts, part.answers) for part in parts])
        metrics["val/sft_loss"] = _sft_loss(torch.cat([part.teacher_log_probs for part in parts]), answered)
        lengths = compute_length_metrics(answered)
        metrics |= {f"val/{name}": value for name, value in lengths.items() if name.startswith("response_length")}
        if self.task_reward is not None:
            metrics |= mean_max_min("val/task_reward", torch.cat([self._task(part) for part in parts]))
        self._show(step, tracking, parts, samples)
        return metrics | self.held_out.score() if self.held_out is not None else metrics

    def _show(self, step: int, tracking: Tracking, parts: list[Answered], samples: list[Sample]) -> None:
        config = self.config.trainer
        if config.log_val_generations > 0:
            ValidationGenerationsLogger().log(tracking, samples[: config.log_val_generations], step)
        if config.validation_data_dir is not None:
            scores = [score for part in parts for score in _score_entries(part)]
            rows = [sample._asdict() | score for sample, score in zip(samples, scores, strict=True)]
            dump_jsonl(Path(config.validation_data_dir) / f"{step}.jsonl", rows)

    def _answered(self) -> Iterator[Answered]:
        """The validation set in file order, answered, with log-probs of the teacher's answers, and, for the files of a
        run with a discriminator, scored."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        size = self.config.data.val_batch_size or len(self.dataset)
        scored = self.discriminator is not None and self.config.trainer.validation_data_dir is not None
        for rows in DataLoader(self.dataset, batch_size=size, collate_fn=self.collate_fn):
            prompts = Prompts.of(DataProto.from_single_dict(rows))
            answers = self.student.sample(table(prompts), sampling, self.seed)
            teacher = self.student.teacher_log_probs(prompts)
            scores = Scores.of(self.discriminator.scores(table(prompts, answers))) if scored else None
            yield Answered(prompts, answers, teacher, scores)

    def _task(self, part: Answered) -> torch.Tensor:
        texts = self.student.texts(part.answers.responses, part.answers.response_mask)
        return score_task(self.task_reward, part.prompts, texts)

    def _samples(self, part: Answered) -> list[Sample]:
        """One sample per answer, in file order."""
        prompts, answers = part.prompts, part.answers
        asked = self.student.texts(prompts.input_ids.unsqueeze(1), prompts.attention_mask.unsqueeze(1))
        texts = self.student.texts(answers.responses, answers.response_mask)
        rows = np.arange(len(texts)) // answers.responses.shape[1]
        teachers = prompts.teacher_text
        return [
            Sample(asked[row], text, teachers[row], rouge_l(text, teachers[row]))
            for row, text in zip(rows, texts, strict=True)
        ]


def _sft_loss(teacher_log_probs: torch.Tensor, answered: DataProto) -> float:
    """Minus the mean log-prob of the teacher's tokens, whatever the loss trained with and its `loss_agg_mode`."""
    return compute_sft_loss(teacher_log_probs.double(), teacher_response_mask(answered), "token-mean").item()


def _score_entries(part: Answered) -> list[dict[str, float]]:
    """The discriminator's scores of each answer and its teacher's; nothing without a discriminator."""
    if part.scores is None:
        return [{}] * part.answers.responses.shape[:2].numel()
    students = part.scores.student_scores
    teachers = part.scores.teacher_scores.expand_as(students)
    pairs = zip(students.flatten().tolist(), teachers.flatten().tolist(), strict=True)
    return [{"score": score, "teacher_score": teacher} for score, teacher in pairs]
