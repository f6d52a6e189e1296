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
from verl.trainer.ppo.core_algos import compute_sft_loss, ends_with_eos
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.folders import run_folder
from verl.trainer.ppo.held_out import HeldOutPairs
from verl.trainer.ppo.metric_utils import compute_length_metrics, mean_max_min
from verl.trainer.ppo.reward import TaskReward, score_task
from verl.trainer.ppo.student import Student
from verl.trainer.ppo.val_samples import write_val_samples
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
        discriminator: scores the answers that are shown or written, if there is one.
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
        if config.save_val_samples:
            write_val_samples(run_folder(config), step, samples)
        if config.validation_data_dir is not None:
            self._dump(parts, samples, Path(config.validation_data_dir) / f"{step}.jsonl")

    def _answered(self) -> Iterator[Answered]:
        """The validation set in file order, answered, with log-probs of the teacher's answers, and, where answers are
        shown or written and there is a discriminator, scored."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        size = self.config.data.val_batch_size or len(self.dataset)
        trainer, shown = self.config.trainer, 0
        written = trainer.save_val_samples or trainer.validation_data_dir is not None
        for rows in DataLoader(self.dataset, batch_size=size, collate_fn=self.collate_fn):
            prompts = Prompts.of(DataProto.from_single_dict(rows))
            answers = self.student.sample(table(prompts), sampling, self.seed)
            teacher = self.student.teacher_log_probs(prompts)
            scores = None
            if self.discriminator is not None and (written or shown < trainer.log_val_generations):
                scores = Scores.of(self.discriminator.scores(table(prompts, answers)))
            shown += answers.responses.shape[:2].numel()
            yield Answered(prompts, answers, teacher, scores)

    def _task(self, part: Answered) -> torch.Tensor:
        texts = self.student.texts(part.answers.responses, part.answers.response_mask)
        return score_task(self.task_reward, part.prompts, texts)

    def _samples(self, part: Answered) -> list[Sample]:
        """One sample per answer, in file order; its prompt is what the user said last."""
        prompts, answers = part.prompts, part.answers
        texts = self.student.texts(answers.responses, answers.response_mask)
        asked = self._asked(prompts)
        stopped = ends_with_eos(answers.responses, answers.response_mask, self.student.eos_token_ids).flatten().tolist()
        tokens = answers.response_mask.sum(-1).flatten().tolist()
        scores = _score_pairs(part)
        per_prompt = answers.responses.shape[1]
        samples = []
        for number, text in enumerate(texts):
            row = number // per_prompt
            teacher = prompts.teacher_text[row]
            reason = "stop" if stopped[number] else "length"
            numbers = rouge_l(text, teacher), *scores[number], int(tokens[number]), reason
            samples.append(Sample(asked[row], text, teacher, *numbers))
        return samples

    def _asked(self, prompts: Prompts) -> list[str]:
        """The last user's text of each prompt; where the dataset gives no messages, the prompt as the model sees it."""
        if prompts.raw_prompt is None:
            return self._whole_prompts(prompts)
        return [
            next((message["content"] for message in reversed(messages) if message["role"] == "user"), whole)
            for messages, whole in zip(prompts.raw_prompt, self._whole_prompts(prompts), strict=True)
        ]

    def _whole_prompts(self, prompts: Prompts) -> list[str]:
        return self.student.texts(prompts.input_ids.unsqueeze(1), prompts.attention_mask.unsqueeze(1))

    def _dump(self, parts: list[Answered], samples: list[Sample], file: Path) -> None:
        """One line per answer, with the prompt as the model sees it."""
        whole = [
            text
            for part in parts
            for text in self._whole_prompts(part.prompts)
            for _ in range(part.answers.responses.shape[1])
        ]
        rows = [sample._replace(prompt=text)._asdict() for sample, text in zip(samples, whole, strict=True)]
        dump_jsonl(file, [{name: value for name, value in row.items() if value is not None} for row in rows])


def _sft_loss(teacher_log_probs: torch.Tensor, answered: DataProto) -> float:
    """Minus the mean log-prob of the teacher's tokens, whatever the loss trained with and its `loss_agg_mode`."""
    return compute_sft_loss(teacher_log_probs.double(), teacher_response_mask(answered), "token-mean").item()


def _score_pairs(part: Answered) -> list[tuple[float, float] | tuple[None, None]]:
    """The discriminator's scores of each answer and of its teacher's."""
    if part.scores is None:
        return [(None, None)] * part.answers.responses.shape[:2].numel()
    students = part.scores.student_scores
    teachers = part.scores.teacher_scores.expand_as(students)
    return list(zip(students.flatten().tolist(), teachers.flatten().tolist(), strict=True))
