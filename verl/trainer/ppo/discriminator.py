"""The driver's handle on the discriminator: scores of the fresh answers as they were before the update, and the update
itself, on fresh answers and, if asked for, past ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from verl.batch import GROUP_KEYS, Answers, Prompts, Scores, columns, table
from verl.config.critic import past_groups
from verl.config.run import Config
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.discriminator_balance import DiscriminatorBalance
from verl.trainer.ppo.own_tokens import OwnTokens
from verl.trainer.ppo.replay import ReplayBuffer
from verl.trainer.ppo.shares import Shares


class Discriminator:
    """Scores and trains the discriminator of one run.

    With one mini-batch and one epoch the scores come out of the update's own forward; otherwise a pass of its own
    takes them first.

    Args:
        config: the run's.
        workers: a group of `CriticWorker`.
        own_tokens: reads answers where the discriminator's tokenizer is not the student's.
    """

    def __init__(self, config: Config, workers: WorkerGroup, own_tokens: OwnTokens | None = None):
        self.workers = workers
        self.own_tokens = own_tokens
        self.scores_from_update = config.critic.ppo_mini_batch_size == config.data.train_batch_size
        self.balance = DiscriminatorBalance(config.critic.balance, config.critic.ppo_epochs)
        self.shares = Shares(config.critic_shares, config.trainer.balance_batch, config.critic.ppo_mini_batch_size)
        self.replay = ReplayBuffer(config.critic.replay.capacity, config.data.seed)
        self.past_per_mini_batch = past_groups(
            config.critic.ppo_mini_batch_size, config.critic.replay.fraction, config.critic_shares
        )

    def scores(self, answered: DataProto) -> DataProto:
        """`Scores` of a table's answers and their teachers', as a table."""
        return self.workers.compute_scores(self._read(answered)[0])

    def _read(self, answered: DataProto) -> tuple[DataProto, dict[str, float]]:
        """The groups of a table in the discriminator's tokens, and what became of them on the way."""
        return (columns(answered, GROUP_KEYS), {}) if self.own_tokens is None else self.own_tokens.groups(answered)

    def score_and_learn(
        self, prompts: Prompts, answers: Answers, step: int, timed: Callable
    ) -> tuple[Scores, dict[str, float]]:
        """Score a step's answers, then learn from them.

        Args:
            timed: `timed(name)` is a context manager that takes the time.

        Returns:
            the scores before the update, and the update's metrics.
        """
        fresh, read = self._read(table(prompts, answers))
        self.replay.check_shapes(fresh)
        mini_batches = len(fresh) // self.shares.mini_batch_size
        past = self._past(mini_batches, step)
        rows, is_past = (fresh, torch.zeros(len(fresh), dtype=torch.bool)) if past is None else self._mixed(fresh, past)
        epochs = self.balance.epochs()
        scores, metrics = self._score_and_train(rows, mini_batches, epochs, timed)
        if self.replay.capacity:
            metrics |= self._replay_metrics(scores, is_past)
            self.replay.add(fresh)
        scores = Scores.of(scores.select_idxs(~is_past))
        self.balance.observe((scores.teacher_scores > scores.student_scores).float().mean().item())
        metrics |= {"critic/balance/d_acc": self.balance.accuracy, "critic/balance/epochs": epochs}
        return scores, metrics | read

    def _score_and_train(
        self, rows: DataProto, mini_batches: int, epochs: int, timed: Callable
    ) -> tuple[DataProto, dict[str, float]]:
        """Scores before the update, and the update's metrics."""
        shares = replace(self.shares, mini_batch_size=len(rows) // mini_batches)

        def call(method: Callable) -> DataProto | list[dict[str, float]]:
            return shares.call(method, rows, mini_batches=mini_batches, epochs=epochs)

        if epochs == 0:
            with timed("values"):
                scores = call(self.workers.score_and_evaluate_critic)
            return scores, scores.meta_info.pop("metrics")[0]
        if epochs == 1 and self.scores_from_update:
            with timed("update_critic"):
                scores = call(self.workers.score_and_update_critic)
            return scores, scores.meta_info.pop("metrics")[0]
        with timed("values"):
            scores = call(self.workers.compute_scores)
        with timed("update_critic"):
            return scores, call(self.workers.update_critic)[0]

    def _past(self, mini_batches: int, step: int) -> DataProto | None:
        """Past groups for every mini-batch, if they are asked for and there are enough."""
        return self.replay.draw(self.past_per_mini_batch * mini_batches, step) if self.replay.capacity else None

    def _mixed(self, fresh: DataProto, past: DataProto) -> tuple[DataProto, torch.Tensor]:
        """The rows of the update, past groups behind the fresh ones of every mini-batch; and which are past ones."""
        parts, is_past = [], []
        for pair in zip(fresh.split(self.shares.mini_batch_size), past.split(self.past_per_mini_batch), strict=True):
            parts.extend(pair)
            is_past.extend([torch.zeros(len(pair[0]), dtype=torch.bool), torch.ones(len(pair[1]), dtype=torch.bool)])
        return DataProto.concat(parts), torch.cat(is_past)

    def _replay_metrics(self, scores: DataProto, is_past: torch.Tensor) -> dict[str, float]:
        metrics = {"critic/replay/fraction": is_past.float().mean().item(), "critic/replay/groups": len(self.replay)}
        if is_past.any():
            difference = (scores.batch["teacher_scores"] - scores.batch["student_scores"])[is_past]
            metrics["critic/replay/d_acc"] = (difference > 0).float().mean().item()
            metrics["critic/replay/score_diff"] = difference.mean().item()
        return metrics
