"""Steps whose update was left out because it was not finite (`workers/updates.py`): counted, kept, and not endured for
long."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from verl.trainer.ppo.steps import Metrics, Step
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in

logger = logging.getLogger(__name__)

FOLDER = "skipped_steps"
# Batches that are kept, the newest.
KEPT = 20


class SkippedSteps:
    """The steps of a run whose update was skipped, for actor or critic.

    Args:
        folder: the run's. The batches of skipped steps are kept under it, for people to look at.
        limit: the run ends after so many in a row (`trainer.max_skipped_steps`).
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self.in_a_row = 0

    def see(self, made: Step, step: int) -> None:
        """Take in the step with this number."""
        skipped = {model: made.metrics.get(f"{model}/skipped_steps", 0) for model in ("actor", "critic")}
        models = " and ".join(model for model, number in skipped.items() if number)
        self.in_a_row = self.in_a_row + 1 if models else 0
        if models:
            logger.warning(
                "step %d: an update of the %s was not finite and was skipped (%d in a row, %d end the run); its batch "
                "is in %s", step, models, self.in_a_row, self.limit, self._keep(made, step),
            )  # fmt: skip

    def _keep(self, made: Step, step: int) -> Path:
        """Write the step's table: tensors as they are, texts as JSON in the file's metadata."""
        file = self.folder / FOLDER / f"{step}.safetensors"
        made_of_it = made.table()
        # Some share their memory, which safetensors refuses.
        tensors = {name: tensor.clone().contiguous() for name, tensor in made_of_it.batch.items()}
        texts = {"teacher_text": json.dumps(made.prompts.teacher_text.tolist())}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata=texts)
            for old in sorted(file.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                old.unlink()
        except (OSError, SafetensorError) as error:
            logger.warning("%s could not be written: %s", file, error)
        return file

    def end_if_too_many(self, metrics: Metrics, last: bool) -> None:
        """See whether the run has to end; with its last step it ends well only if that was not skipped.

        Raises:
            FloatingPointError: the limit is reached, or the end is.
        """
        if self.in_a_row < (1 if last else self.limit):
            return
        there = [folder.name for folder in checkpoints_in(self.folder)]
        rates = ", ".join(f"{name} {metrics[name]:.3g}" for name in ("actor/lr", "critic/lr") if name in metrics)
        raise FloatingPointError(
            f"the last {self.in_a_row} steps had an update that was not finite and was skipped "
            f"(trainer.max_skipped_steps={self.limit}): training has diverged, or their batches are bad. Lower the "
            f"learning rate ({rates}), and look at {self.folder / FOLDER}. Checkpoints: {', '.join(there) or 'none'}; "
            "the weights of the newest may be what broke: go on from one before it with "
            "trainer.resume_mode=resume_path trainer.resume_from_path=..., or begin afresh with "
            "trainer.resume_mode=disable"
        )
