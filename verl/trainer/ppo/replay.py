"""Past student answers that the discriminator keeps meeting (persistent negatives, arXiv 2609.30864).

A discriminator that sees the newest answers alone may forget what was wrong with older ones, and the student may go
back to them. The buffer keeps whole groups, a prompt with its teacher answer and the student's answers of one step, so
that a past answer is compared with the teacher's answer to its own prompt. The actor never sees it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from verl.batch import GROUP_KEYS
from verl.protocol import DataProto

logger = logging.getLogger(__name__)


class ReplayBuffer:
    """The newest `capacity` answers, in whole groups; drawn uniformly.

    Args:
        capacity: answers; groups that would exceed it drive out the oldest.
        seed: what is drawn is a function of (seed, step, contents), so that a resumed run draws the same.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self.seed = seed
        self.groups: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Groups in the buffer."""
        return len(next(iter(self.groups.values()))) if self.groups else 0

    def add(self, batch: DataProto) -> None:
        """Keep a batch's groups (B rows), forgetting the oldest ones beyond the capacity."""
        new = {key: batch.batch[key].to(torch.int32) for key in GROUP_KEYS}
        if self.groups:
            new = {key: torch.cat([self.groups[key], tensor]) for key, tensor in new.items()}
        self._keep(new)

    def _keep(self, groups: dict[str, torch.Tensor]) -> None:
        """The newest groups that fit; copies, so that nothing else stays in memory or mapped to a file."""
        fitting = self.capacity // groups["responses"].shape[1]
        first = max(0, len(groups["responses"]) - fitting)
        self.groups = {key: tensor[first:].clone() for key, tensor in groups.items()}

    def draw(self, groups: int, step: int) -> DataProto | None:
        """`groups` different groups, or None while there are fewer."""
        if len(self) < groups:
            return None
        rows = np.random.default_rng((self.seed, step)).choice(len(self), size=groups, replace=False)
        return DataProto.from_dict({key: tensor[rows].long() for key, tensor in self.groups.items()})

    def check_shapes(self, batch: DataProto) -> None:
        """ValueError if the buffer, restored from a checkpoint, holds groups of another shape than the batch's."""
        for key, tensor in self.groups.items():
            held, made = tuple(tensor.shape[1:]), tuple(batch.batch[key].shape[1:])
            if held != made:
                raise ValueError(
                    f"the replay buffer holds {key} of shape {held} per prompt, and this run makes {made}: keep "
                    "rollout.n and the lengths (data.max_prompt_length and max_response_length, or those of critic, "
                    "where the discriminator has a tokenizer of its own) as they were, or set "
                    "critic.replay.capacity=0"
                )

    def save(self, file: Path) -> None:
        """Write the contents; nothing while there are none."""
        if self.groups:
            save_file(self.groups, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote, as much as the capacity holds; without a file the buffer starts empty."""
        if self.capacity == 0:
            return
        if file.is_file():
            self._keep(load_file(file))
        else:
            logger.warning("there is no %s: the replay buffer starts empty", file)
