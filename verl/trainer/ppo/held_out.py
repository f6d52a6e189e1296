"""The discriminator on prompts it is never trained on: against stored answers of the student as the run found it, and
against fresh ones.

    val/critic/*         fresh answers, sampled as in training. Against the training step's `critic/*`: a training
                         accuracy far above is an over-fitted discriminator.
    val/critic/fixed/*   the stored answers. They stay as they are, so a fall means that the discriminator got worse;
                         where it holds while `val/critic/d_acc` falls, the student got better.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Subset

from verl.batch import CRITIC_PROMPT_KEYS, GROUP_KEYS, PROMPT_KEYS, TEACHER_KEYS, columns, table
from verl.config.run import Config
from verl.protocol import DataProto
from verl.trainer.ppo.discriminator import Discriminator
from verl.trainer.ppo.metric_utils import compute_discriminator_metrics
from verl.trainer.ppo.student import Student

logger = logging.getLogger(__name__)


class HeldOutAccuracy(NamedTuple):
    """Share of pairs whose teacher scores higher, its standard error over prompts, and the number of prompts."""

    value: float
    error: float
    prompts: int


class HeldOutPairs:
    """The first `critic.held_out_prompts` validation prompts with their teacher answers, and the stored answers."""

    def __init__(
        self,
        config: Config,
        student: Student,
        discriminator: Discriminator,
        dataset: Dataset,
        collate_fn: Callable[[list], dict],
        seed: int,
    ):
        self.sampling = config.actor_rollout_ref.rollout.sampling
        self.student, self.discriminator = student, discriminator
        self.seed = seed
        self.batch_size = config.data.val_batch_size or len(dataset)
        rows = Subset(dataset, range(min(config.critic.held_out_prompts, len(dataset))))
        batches = DataLoader(rows, batch_size=self.batch_size, collate_fn=collate_fn)
        prompts = DataProto.concat([DataProto.from_single_dict(batch) for batch in batches])
        self.prompts = columns(prompts, PROMPT_KEYS + TEACHER_KEYS + CRITIC_PROMPT_KEYS)
        self.fixed: DataProto | None = None

    def store(self, step: int) -> None:
        """Keep the present student's answers as the fixed ones, unless a checkpoint has brought some."""
        if self.fixed is not None:
            return
        if step > 0:
            logger.warning(
                "the checkpoint has no stored answers to these %d prompts: val/critic/fixed/* is measured on answers "
                "of step %d instead of the first student's", len(self.prompts), step,
            )  # fmt: skip
        self.fixed = DataProto.concat([self._answered(part) for part in self.prompts.split(self.batch_size)])

    def score(self) -> dict[str, float]:
        """`val/critic/*` and `val/critic/fixed/*`."""
        parts = self.prompts.split(self.batch_size)
        fresh = compute_discriminator_metrics(self._scored(self._answered(part) for part in parts))
        fixed = compute_discriminator_metrics(self._scored(self.fixed.split(self.batch_size)))
        metrics = {f"val/{name}": value for name, value in fresh.items()}
        return metrics | {f"val/critic/fixed/{name.removeprefix('critic/')}": value for name, value in fixed.items()}

    def accuracy(self) -> HeldOutAccuracy:
        """How well the discriminator tells the stored answers from the teacher's now."""
        return self._accuracy(self.fixed.split(self.batch_size))

    def present_accuracy(self) -> HeldOutAccuracy:
        """How well it tells those of the present student."""
        return self._accuracy(self._answered(part) for part in self.prompts.split(self.batch_size))

    def _accuracy(self, parts: Iterable[DataProto]) -> HeldOutAccuracy:
        tensors = self._scored(parts).batch
        per_prompt = (tensors["teacher_scores"] > tensors["student_scores"]).double().mean(-1)
        error = per_prompt.std(correction=0).item() / math.sqrt(max(1, len(per_prompt) - 1))
        return HeldOutAccuracy(per_prompt.mean().item(), error, len(per_prompt))

    def _answered(self, prompts: DataProto) -> DataProto:
        prompts = DataProto(prompts.batch.clone())
        answers = table(self.student.sample(prompts, self.sampling, self.seed))
        return columns(prompts.union(answers), GROUP_KEYS + CRITIC_PROMPT_KEYS)

    def _scored(self, parts: Iterable[DataProto]) -> DataProto:
        scored = []
        for part in parts:
            part = DataProto(part.batch.clone())
            scored.append(part.union(self.discriminator.scores(part)))
        return DataProto.concat(scored)

    def save(self, file: Path) -> None:
        """Write the stored answers."""
        if self.fixed is not None:
            save_file({key: self.fixed.batch[key].contiguous() for key in GROUP_KEYS}, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote, if it belongs to this run's prompts; `store` says so if nothing did."""
        if not file.is_file():
            return
        # Copies: a mapped file could not be pruned on every file system.
        stored = DataProto.from_dict({key: tensor.clone() for key, tensor in load_file(file).items()})
        keys = PROMPT_KEYS + TEACHER_KEYS
        if all(torch.equal(stored.batch[key], self.prompts.batch[key]) for key in keys):
            own = [key for key in CRITIC_PROMPT_KEYS if key in self.prompts.batch]
            self.fixed = stored.union(columns(self.prompts, own)) if own else stored
