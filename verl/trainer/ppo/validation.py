"""Validation: greedy answers to the held-out prompts, their ROUGE-L, and the SFT loss of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader

from verl.batch import GROUP_KEYS, PROMPT_KEYS, TEACHER_KEYS, teacher_response_mask
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_sft_loss
from verl.trainer.ppo.metric_utils import compute_length_metrics, mean_max_min
from verl.utils.dump import dump_jsonl
from verl.utils.rouge import rouge_l
from verl.utils.tracking import Sample, Tracking, ValidationGenerationsLogger

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer


def validate(trainer: RayPPOTrainer, tracking: Tracking, seed: int) -> dict[str, float]:
    """Answer every held-out prompt and compare with the teacher.

    Returns:
        `val/rouge-L/mean`, `val/sft_loss`, `val/response_length/*` and, with a task reward, `val/task_reward/*`.
    """
    answered = DataProto.concat(list(_answered_batches(trainer, seed)))
    samples = _samples(trainer, answered)
    metrics = {"val/rouge-L/mean": float(np.mean([sample.rouge for sample in samples]))}
    metrics["val/sft_loss"] = _sft_loss(answered)
    lengths = compute_length_metrics(answered)
    metrics |= {f"val/{name}": value for name, value in lengths.items() if name.startswith("response_length")}
    if trainer.task_reward is not None:
        metrics |= mean_max_min("val/task_reward", trainer.score_task(answered))

    config = trainer.config.trainer
    if config.log_val_generations > 0:
        ValidationGenerationsLogger().log(tracking, samples[: config.log_val_generations], trainer.global_step)
    if config.validation_data_dir is not None:
        path = Path(config.validation_data_dir) / f"{trainer.global_step}.jsonl"
        scores = _scores(answered)
        dump_jsonl(path, [sample._asdict() | score for sample, score in zip(samples, scores, strict=True)])
    return metrics


def _sft_loss(answered: DataProto) -> float:
    """Minus the mean log-prob of the teacher's tokens, whatever the loss trained with and its `loss_agg_mode`."""
    log_probs = answered.batch["teacher_log_probs"].double()
    return compute_sft_loss(log_probs, teacher_response_mask(answered), "token-mean").item()


def _scores(answered: DataProto) -> list[dict[str, float]]:
    """The discriminator's scores of each answer and its teacher's; nothing without a discriminator."""
    students = answered.batch.get("student_scores")
    if students is None:
        return [{}] * answered.batch["responses"].shape[:2].numel()
    teachers = answered.batch["teacher_scores"].expand_as(students)
    pairs = zip(students.flatten().tolist(), teachers.flatten().tolist(), strict=True)
    return [{"score": score, "teacher_score": teacher} for score, teacher in pairs]


def _answered_batches(trainer: RayPPOTrainer, seed: int) -> Iterator[DataProto]:
    """The validation set in file order, answered, with log-probs of the teacher's answers, and, for the files of a run
    with a discriminator, scored."""
    data, rollout = trainer.config.data, trainer.config.actor_rollout_ref.rollout
    size = data.val_batch_size or len(trainer.val_dataset)
    for rows in DataLoader(trainer.val_dataset, batch_size=size, collate_fn=trainer.collate_fn):
        batch = DataProto.from_single_dict(rows)
        batch.union(trainer.generate(batch, rollout.val_kwargs, seed))
        teachers = trainer.take(batch, PROMPT_KEYS + TEACHER_KEYS)
        batch.union(trainer.actor_rollout.compute_teacher_log_prob(teachers))
        if trainer.critic is not None and trainer.config.trainer.validation_data_dir is not None:
            batch.union(trainer.critic.compute_scores(trainer.take(batch, GROUP_KEYS)))
        yield batch


def _samples(trainer: RayPPOTrainer, answered: DataProto) -> list[Sample]:
    """One sample per answer, in file order."""
    per_prompt = answered.batch["responses"].shape[1]
    prompts = trainer.decode(answered.batch["input_ids"].unsqueeze(1), answered.batch["attention_mask"].unsqueeze(1))
    answers = trainer.decode(answered.batch["responses"], answered.batch["response_mask"])
    teachers = answered.non_tensor_batch["teacher_text"]
    rows = torch.arange(len(answers)) // per_prompt
    return [
        Sample(prompts[row], answer, teachers[row], rouge_l(answer, teachers[row]))
        for row, answer in zip(rows.tolist(), answers, strict=True)
    ]
