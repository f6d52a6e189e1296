"""The discriminator on prompts it is never trained on: against stored answers of the student as the run found it, and
against fresh ones.

    val/critic/*         fresh answers, sampled as in training. Against the training step's `critic/*`: a training
                         accuracy far above is an over-fitted discriminator.
    val/critic/fixed/*   the stored answers. They stay as they are, so a fall means that the discriminator got worse;
                         where it holds while `val/critic/d_acc` falls, the student got better.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset

from verl.protocol import DataProto
from verl.trainer.ppo.metric_utils import compute_discriminator_metrics
from verl.workers.batch import PROMPT_KEYS, STUDENT_KEYS, TEACHER_KEYS

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

KEPT = PROMPT_KEYS + TEACHER_KEYS + STUDENT_KEYS


class HeldOutPairs:
    """The first `critic.held_out_prompts` validation prompts with their teacher answers, and the stored answers."""

    def __init__(self, trainer: RayPPOTrainer, seed: int):
        self.trainer = trainer
        self.seed = seed
        count = min(trainer.config.critic.held_out_prompts, len(trainer.val_dataset))
        data = trainer.config.data
        size = data.val_batch_size or data.train_batch_size
        loader = DataLoader(Subset(trainer.val_dataset, range(count)), batch_size=size, collate_fn=trainer.collate_fn)
        rows = [DataProto.from_single_dict(batch) for batch in loader]
        self.prompts = DataProto.concat(rows).select([*PROMPT_KEYS, *TEACHER_KEYS], non_tensor_batch_keys=[])
        self.fixed: DataProto | None = None

    def store(self) -> None:
        """Keep the present student's answers as the fixed ones, unless a checkpoint has brought some."""
        if self.fixed is None:
            self.fixed = self._answered()

    def score(self) -> dict[str, float]:
        """`val/critic/*` and `val/critic/fixed/*`."""
        metrics = {f"val/{name}": value for name, value in self._metrics(self._answered()).items()}
        for name, value in self._metrics(self.fixed).items():
            metrics[f"val/critic/fixed/{name.removeprefix('critic/')}"] = value
        return metrics

    def _answered(self) -> DataProto:
        sampling = self.trainer.config.actor_rollout_ref.rollout.sampling
        prompts = DataProto(self.prompts.batch.clone())
        return prompts.union(self.trainer.generate(prompts, sampling, self.seed)).select(list(KEPT))

    def _metrics(self, answered: DataProto) -> dict[str, float]:
        answered = DataProto(answered.batch.clone())
        return compute_discriminator_metrics(answered.union(self.trainer.critic.compute_scores(answered)))

    def save(self, file: Path) -> None:
        """Write the stored answers; nothing while there are none."""
        if self.fixed is not None:
            save_file({key: self.fixed.batch[key].contiguous() for key in KEPT}, file)

    def load(self, file: Path) -> None:
        """Restore what `save` wrote; a file that is not there leaves none."""
        if file.is_file():
            self.fixed = DataProto.from_dict(load_file(file))
