"""The discriminator's part of a training step: scores of the fresh answers as they were before the update, and the
update itself, on fresh answers and, if asked for, past ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from verl.batch import GROUP_KEYS
from verl.config.run import Config
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.balancing import balance
from verl.trainer.ppo.discriminator_balance import DiscriminatorBalance
from verl.trainer.ppo.replay import ReplayBuffer, past_groups

# Row of the fresh batch that a row of the discriminator's batch came from; -1 for a past group.
FRESH_ROW = "fresh_row"


class DiscriminatorStep:
    """Scores and trains the discriminator of one run.

    With one mini-batch and one epoch the scores come out of the update's own forward; otherwise a pass of its own
    takes them first.
    """

    def __init__(self, config: Config, critic: WorkerGroup):
        self.critic = critic
        self.mini_batch_size = config.critic.ppo_mini_batch_size
        self.scores_from_update = self.mini_batch_size == config.data.train_batch_size
        self.balance = DiscriminatorBalance(config.critic.balance, config.critic.ppo_epochs)
        self.ranks, self.by_tokens = config.trainer.ranks, config.trainer.balance_batch
        self.replay = ReplayBuffer(config.critic.replay.capacity, config.data.seed)
        self.past_per_mini_batch = past_groups(self.mini_batch_size, config.critic.replay.fraction, self.ranks)

    def run(self, batch: DataProto, step: int, timed: Callable) -> dict[str, float]:
        """Add the scores (`ScoreTable`'s tensors) to the batch, in place, and train.

        Args:
            batch: B fresh rows.
            timed: `timed(name)` is a context manager that takes the time.

        Returns:
            the update's metrics.
        """
        mixed, mini_batches = self._mix(batch, step)
        rows = mixed.select(list(GROUP_KEYS), non_tensor_batch_keys=[])
        epochs = self.balance.epochs()
        rows.meta_info = {"mini_batches": mini_batches, "epochs": epochs}
        scores, metrics = self._score_and_train(rows, epochs, timed)
        if self.replay.capacity:
            metrics |= self._replay_metrics(scores, mixed)
            # In the data's order, which is the same for any number of ranks.
            self.replay.add(batch.select_idxs(batch.batch["data_order"].argsort()))
        fresh_row = mixed.batch[FRESH_ROW]
        position = torch.empty(len(batch), dtype=torch.long)
        position[fresh_row[fresh_row >= 0]] = (fresh_row >= 0).nonzero().flatten()
        batch.union(DataProto.from_dict({key: value[position] for key, value in scores.batch.items()}))
        fresh = batch.batch["teacher_scores"] > batch.batch["student_scores"]
        self.balance.observe(fresh.float().mean().item())
        return metrics | {"critic/balance/d_acc": self.balance.accuracy, "critic/balance/epochs": epochs}

    def _score_and_train(self, rows: DataProto, epochs: int, timed: Callable) -> tuple[DataProto, dict[str, float]]:
        """Scores before the update, and the update's metrics."""
        if epochs == 0:
            with timed("values"):
                scores = self.critic.score_and_evaluate_critic(rows)
            return scores, scores.meta_info.pop("metrics")[0]
        if epochs == 1 and self.scores_from_update:
            with timed("update_critic"):
                scores = self.critic.score_and_update_critic(rows)
            return scores, scores.meta_info.pop("metrics")[0]
        with timed("values"):
            scores = self.critic.compute_scores(rows)
        with timed("update_critic"):
            return scores, self.critic.update_critic(rows)[0]

    def _mix(self, batch: DataProto, step: int) -> tuple[DataProto, int]:
        """The rows of the update, past groups spread evenly over the mini-batches; and the number of those."""
        self.replay.check_shapes(batch)
        mini_batches = len(batch) // self.mini_batch_size
        fresh = batch.select([*GROUP_KEYS, "data_order"], non_tensor_batch_keys=[])
        fresh.batch[FRESH_ROW] = torch.arange(len(batch))
        past = self.replay.draw(self.past_per_mini_batch * mini_batches, step) if self.replay.capacity else None
        if past is None:
            return balance(fresh, self.mini_batch_size, self.ranks, self.by_tokens)[0], mini_batches
        past.batch["data_order"] = torch.zeros(len(past), dtype=torch.long)
        past.batch[FRESH_ROW] = torch.full((len(past),), -1)
        fresh = fresh.select_idxs(fresh.batch["data_order"].argsort())
        parts = [
            part
            for pair in zip(fresh.split(self.mini_batch_size), past.split(self.past_per_mini_batch), strict=True)
            for part in pair
        ]
        mixed = DataProto.concat(parts)
        mixed.batch["data_order"] = torch.arange(len(mixed))
        size = self.mini_batch_size + self.past_per_mini_batch
        return balance(mixed, size, self.ranks, self.by_tokens)[0], mini_batches

    def _replay_metrics(self, scores: DataProto, mixed: DataProto) -> dict[str, float]:
        past = mixed.batch[FRESH_ROW] < 0
        metrics = {"critic/replay/fraction": past.float().mean().item(), "critic/replay/groups": len(self.replay)}
        if past.any():
            difference = (scores.batch["teacher_scores"] - scores.batch["student_scores"])[past]
            metrics["critic/replay/d_acc"] = (difference > 0).float().mean().item()
            metrics["critic/replay/score_diff"] = difference.mean().item()
        return metrics
