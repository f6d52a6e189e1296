"""The answers that SODA rejects: one of the student's own to every training prompt.

With `soda.resample=once` they are all written by the stage's first weights, before its first step; with `epoch` all are
written anew, by the weights at hand, when an epoch begins. A step then only looks its pairs up. Beside each answer are
the frozen reference's log-probs of it and of the teacher's: nothing changes them, so they are computed once as well.

The draws depend on the seed, the epoch, the data's order in its files, the number of ranks and how many prompts an
engine gets at once (`rollout.max_num_seqs`), not on batches, shuffling or restarts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from verl.batch import PAIR_REFERENCE_KEYS, Answers, PairLogProbs, Prompts, table, teacher_response_mask
from verl.config.run import Config
from verl.protocol import DataProto
from verl.trainer.ppo.student import Student
from verl.utils.run_log import phase

logger = logging.getLogger(__name__)

# An engine that has to be given its weights for every call gets so many times the prompts.
CALLS_PER_PUSH = 4


class RejectedAnswers:
    """One rejected answer per training row, kept end to end without padding.

    Args:
        config: the run's.
        student: who answers.
        dataset: the training rows.
        seed: added to the rollout's, so that no other draw is replayed.
    """

    def __init__(
        self, config: Config, student: Student, dataset: Dataset, collate_fn: Callable[[list], dict], seed: int
    ):
        self.config = config
        self.student = student
        self.dataset, self.collate_fn = dataset, collate_fn
        self.seed = seed
        self.epoch = -1
        # index (R,) int64, the data's row numbers; lengths (R,) and tokens (all answers') int32; PAIR_REFERENCE_KEYS.
        self.answers: dict[str, torch.Tensor] = {}

    def of(self, prompts: Prompts, samples_seen: int, step: int) -> tuple[Answers, PairLogProbs, dict[str, float]]:
        """The rejected answers to a batch as it comes from the data, one each, and the reference's log-probs of its
        pairs.

        A batch may reach over the end of an epoch: rows of the new one get answers drawn now.

        Args:
            samples_seen: training rows before this batch.
            step: for messages.

        Returns:
            beside them the share of pairs of two equal answers, which have no gradient, and of a draw the sync check's
            metrics.
        """
        metrics: dict[str, float] = {}
        epochs = np.zeros(len(prompts), dtype=np.int64)
        if self.config.soda.resample == "epoch":
            epochs = (samples_seen + np.arange(len(prompts))) // len(self.dataset)
        index, parts = prompts.index.astype(np.int64), []
        for epoch in np.unique(epochs):
            if epoch > self.epoch:
                metrics |= self._draw(int(epoch), step)
            parts.append(self._look_up(index[epochs == epoch]))
        found = DataProto.concat(parts)
        answers = Answers.of(found)
        metrics["actor/soda_equal_frac"] = equal_pairs(table(prompts, answers)).float().mean().item()
        return answers, PairLogProbs.of(found), metrics

    def _look_up(self, index: np.ndarray) -> DataProto:
        """Rows of the data by their numbers."""
        answers, width = self.answers, self.config.data.max_response_length
        order = answers["index"].argsort()
        place = torch.searchsorted(answers["index"][order], torch.from_numpy(index)).clamp(max=len(order) - 1)
        rows = order[place]
        missing = index[(answers["index"][rows] != torch.from_numpy(index)).numpy()]
        if len(missing):
            raise ValueError(
                f"the checkpoint has no rejected answers to data rows {missing[:10].tolist()}: resume with the "
                "training data as it was, or start a new run from the checkpoint's actor folder"
            )
        lengths = answers["lengths"][rows].long()
        mask = torch.arange(width) < lengths.unsqueeze(-1)
        ends = answers["lengths"].long().cumsum(0)[rows]
        responses = torch.zeros(mask.shape, dtype=torch.long)
        responses[mask] = answers["tokens"][((ends - lengths).unsqueeze(-1) + torch.arange(width))[mask]].long()
        found = {"responses": responses.unsqueeze(1), "response_mask": mask.long().unsqueeze(1)}
        return DataProto.from_dict(found | {key: answers[key][rows] for key in PAIR_REFERENCE_KEYS})

    def _draw(self, epoch: int, step: int) -> dict[str, float]:
        """Let the student answer every training prompt, in the data's own order; the first batch's answers are compared
        with the engine's log-probs."""
        config, rollout = self.config, self.config.actor_rollout_ref.rollout
        size = rollout.max_num_seqs * config.trainer.ranks * (CALLS_PER_PUSH if rollout.drops_weights else 1)
        loader = DataLoader(
            self.dataset,
            batch_size=size,
            num_workers=config.data.dataloader_num_workers,
            collate_fn=self.collate_fn,
        )
        bar = tqdm(total=len(self.dataset), desc="rejected answers", leave=False, dynamic_ncols=True, disable=None)
        metrics, parts = {}, []
        with phase(f"sampling {len(self.dataset)} answers to be rejected"), bar:
            for number, rows in enumerate(loader):
                seed = rollout.seed + self.seed + epoch * len(loader) + number
                prompts = Prompts.of(DataProto.from_single_dict(rows))
                reported = 0 if metrics else rollout.sync_check_prompts
                answers = self.student.sample(table(prompts), rollout.sampling, seed, reported)
                metrics = metrics or self.student.check_sync(prompts, answers, None, step)
                parts.append(_compact(prompts, answers, self.student.pair_reference_log_probs(prompts, answers)))
                bar.update(len(prompts))
        self.epoch = epoch
        self.answers = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        lengths, limit = self.answers["lengths"].float(), rollout.response_length
        logger.info(
            "%d answers to be rejected, written by the student of step %d: %.1f tokens on average, %.1f%% fill all %d",
            len(lengths), step, lengths.mean(), 100 * (lengths == limit).float().mean(), limit,
        )  # fmt: skip
        return metrics

    def save(self, file: Path) -> None:
        """Write the answers and their epoch."""
        save_file(self.answers | {"epoch": torch.tensor(self.epoch)}, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            FileNotFoundError: the checkpoint is not one of a SODA run.
            ValueError: an answer is longer than `data.max_response_length` allows.
        """
        refuse_another_stage(file)
        # Copies: a mapped file could not be pruned on every file system.
        stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
        self.epoch, self.answers = int(stored.pop("epoch")), stored
        if not stored:
            return  # Saved before the first draw, as the best so far.
        longest, limit = int(stored["lengths"].max()), self.config.data.max_response_length
        if longest > limit:
            raise ValueError(
                f"{file} has an answer of {longest} tokens, more than data.max_response_length={limit}: resume with "
                "the value that it was written with"
            )


def _compact(prompts: Prompts, answers: Answers, reference: PairLogProbs) -> dict[str, torch.Tensor]:
    """A batch's answers end to end, with their rows, lengths and log-probs."""
    mask = answers.response_mask[:, 0].bool()
    return {
        "index": torch.from_numpy(prompts.index.astype(np.int64)),
        "lengths": mask.sum(-1).int(),
        "tokens": answers.responses[:, 0][mask].int(),
        **{key: tensor.clone() for key, tensor in reference.tensors().items()},
    }


def equal_pairs(batch: DataProto) -> torch.Tensor:
    """(B,) bool: whether the student's answer is the teacher's, token by token."""
    mask, teacher_mask = batch.batch["response_mask"][:, 0], teacher_response_mask(batch)
    same = batch.batch["responses"][:, 0] * mask == batch.batch["teacher_response"] * teacher_mask
    return (same & (mask == teacher_mask)).all(-1)


def refuse_another_stage(file: Path) -> None:
    """FileNotFoundError for a checkpoint without these answers, which is not one of SODA."""
    if not file.is_file():
        raise FileNotFoundError(
            f"cannot resume from {file.parent}: it has no {file.name}, so it is another stage's; give its actor folder "
            "as actor_rollout_ref.model.path and SODA a folder of its own (trainer.experiment_name), or set "
            "trainer.resume_mode=disable"
        )
