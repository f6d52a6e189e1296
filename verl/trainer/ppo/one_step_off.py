"""Generation one step ahead of training (`trainer.rollout_ahead=1`): while a batch is trained on, engines on devices of
their own write the answers to the next one.

    step          N-1                  N                     N+1
    trainers      train on batch N-1   train on batch N      ...
                  -> weights N         -> weights N+1
    engines       write batch N        write batch N+1       ...
                  by weights N-1       by weights N

So what a step trains on was written by the weights one update before its own. The first batch is written by the
weights that the run begins with, before its first step; in the last step nothing is written.

Whether the engine has the trainer's weights cannot be seen of such answers. Instead, right after each push the engine
writes the beginnings of a few, whose log-probs the trainer compares with its own before it updates these weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from verl.batch import Answers, LogProbs, Prompts, table
from verl.config import RolloutConfig
from verl.trainer.ppo.engine import OwnEngine
from verl.trainer.ppo.generation import Metrics, Timed
from verl.trainer.ppo.student import Student, mean_entropy, to_answer

logger = logging.getLogger(__name__)

# Tokens of an answer by which the engine's weights are compared with the trainer's.
COMPARED_TOKENS = 16


class Ahead(NamedTuple):
    """Answers that may still be being written.

    wait: returns them when they are there.
    change: how often the weights had changed that write them (`Student.changes`).
    """

    prompts: Prompts
    wait: Callable[[], Answers]
    change: int


class Restored(NamedTuple):
    """Answers from a checkpoint, to prompts by their rows' numbers in the data, written so many changes before."""

    index: np.ndarray
    answers: Answers
    staleness: int


class OneStepOff:
    """A step's answers are written while the one before it trains; a checkpoint has those to its next batch.

    Args:
        engine: which writes them, the student's.
        weighs: whether an update weighs answers by the engine's log-probs, which are reported of all then.
    """

    def __init__(self, student: Student, engine: OwnEngine, config: RolloutConfig, weighs: bool):
        self.student, self.engine, self.config, self.weighs = student, engine, config, weighs
        self.ahead: Ahead | None = None
        self.compared: Ahead | None = None
        self.restored: Restored | None = None
        self._following: Prompts | None = None

    def through(self, batches: Iterator[Prompts], step: int) -> Generator[Prompts, None, None]:
        """As `Generation.through`; the first batch's answers are begun at once."""
        prompts = next(batches, None)
        try:
            if prompts is not None:
                self._begin_first(prompts, step)
            while prompts is not None:
                self._following = next(batches, None)
                yield prompts
                prompts = self._following
        finally:
            self.ahead = self.compared = self._following = None

    def _begin_first(self, prompts: Prompts, step: int) -> None:
        restored, self.restored = self.restored, None
        if restored is not None and self._is_of(restored, prompts):
            self.ahead = Ahead(prompts, lambda: restored.answers, self.student.changes - restored.staleness)
            return
        if restored is not None:
            logger.warning(
                "the checkpoint's answers to the next batch are to other prompts than this run's, of another number or "
                "length, or without log-probs: they are written anew, by the weights at hand"
            )
        self.student.push_weights()
        self._begin(prompts, step)

    def _is_of(self, restored: Restored, prompts: Prompts) -> bool:
        """Whether restored answers are such as this run would write to the prompts."""
        answers, shape = restored.answers, (len(prompts), self.config.n, self.config.response_length)
        same = np.array_equal(restored.index, _index(prompts)) and tuple(answers.responses.shape) == shape
        return same and (not self.weighs or bool(answers.rollout_log_probs_mask.all()))

    def _begin(self, prompts: Prompts, step: int) -> None:
        """Let the engine begin with what that step will train on."""
        seed, reported = self.config.seed + step, len(prompts) if self.weighs else 0
        wait = self.engine.begin(to_answer(table(prompts), self.config.sampling, seed, reported))
        self.ahead = Ahead(prompts, lambda: Answers.of(wait()), self.student.changes)

    def _begin_comparison(self, prompts: Prompts, step: int) -> None:
        """Let the engine write the beginnings of a few answers, to be compared by `check_sync`."""
        count = min(len(prompts), self.config.sync_check_prompts * self.engine.ranks)
        if count == 0:
            return
        few = prompts.first(count)
        asked = to_answer(table(few), self.config.sampling, self.config.seed + step, count, longest=COMPARED_TOKENS)
        wait = self.engine.begin(asked)
        self.compared = Ahead(few, lambda: Answers.of(wait()), self.student.changes)

    def answers(self, prompts: Prompts, step: int, timed: Timed) -> tuple[Answers, Metrics]:
        """Those that were begun a step before; those to the next batch are begun, by the weights of now.

        Returns:
            beside them `training/rollout_staleness`, the updates between the weights that wrote them and those of now.
        """
        with timed("gen_wait"):
            answers = self._written()
        staleness = self.student.changes - self.ahead.change
        self.ahead = None
        if self._following is not None:
            with timed("push_weights"):
                self.student.push_weights()
            self._begin_comparison(self._following, step + 1)
            self._begin(self._following, step + 1)
        return answers, {"training/rollout_staleness": float(staleness)}

    def _written(self) -> Answers:
        """The answers that were begun, once they are there; they may be asked for again."""
        answers = self.ahead.wait()
        self.ahead = self.ahead._replace(wait=lambda: answers)
        return answers

    def check_sync(self, prompts: Prompts, answers: Answers, log_probs: LogProbs | None, step: int) -> Metrics:
        """As `Generation.check_sync`, of answers that the engine began after the last push; in the last step, which
        begins none, the entropy alone."""
        metrics = {} if log_probs is None else mean_entropy(table(answers, log_probs))
        compared, self.compared = self.compared, None
        if compared is None:
            return metrics
        return metrics | self.student.check_sync(compared.prompts, compared.wait(), None, step)

    # ------------------------------------------------------------ in checkpoints

    def save(self, file: Path) -> None:
        """Write the answers to the next batch, which are waited for; nothing where there is none."""
        if self.ahead is None:
            return
        tensors = {name: tensor.contiguous() for name, tensor in self._written().tensors().items()}
        staleness = torch.tensor(self.student.changes - self.ahead.change)
        save_file(tensors | {"index": torch.from_numpy(_index(self.ahead.prompts)), "staleness": staleness}, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote; without a file the next batch's answers are written by the weights at hand."""
        if not file.is_file():
            return
        # Copies: a mapped file could not be pruned on every file system.
        stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
        index, staleness = stored.pop("index").numpy(), int(stored.pop("staleness"))
        self.restored = Restored(index, Answers(**stored), staleness)


def _index(prompts: Prompts) -> np.ndarray:
    return prompts.index.astype(np.int64)
