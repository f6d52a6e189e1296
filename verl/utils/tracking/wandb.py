"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.utils.tracking.base import Backend, Run, Sample, earlier_run, keep_run


class WandbBackend(Backend):
    """Weights & Biases, which takes its key from its own environment variable or login.

    A resumed run goes on in the earlier one's. Steps that it makes again are there already, and W&B leaves out the
    second ones.
    """

    remote: ClassVar[bool] = True
    package: ClassVar[str | None] = "wandb"

    @classmethod
    def check_access(cls) -> None:
        """ValueError: there is no key. At a terminal, W&B asks for one."""
        # With a key in the environment there is nothing to ask for, and `login` would look up whose it is over the
        # network.
        if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled") or os.environ.get("WANDB_API_KEY"):
            return
        import wandb

        try:
            wandb.login(verify=False)
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"trainer.logger asks for wandb, which has no key ({error}): run `wandb login` or set WANDB_API_KEY, "
                "set WANDB_MODE=offline to send it later, or leave wandb out"
            ) from error

    def __init__(self, run: Run):
        import wandb

        self.wandb = wandb
        named = earlier_run(run, "wandb")
        self.run = wandb.init(
            project=run.project,
            name=run.experiment,
            config=dict(run.config),
            id=named,
            resume=None if named is None else "allow",
        )
        keep_run(run, "wandb", self.run.id)

    def log(self, data: Mapping[str, float], step: int) -> None:
        self.run.log(dict(data), step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        table = self.wandb.Table(columns=["step", *Sample._fields], data=[[step, *sample] for sample in samples])
        self.run.log({"val/generations": table}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        self.run.alert(title=title, text=text, level=self.wandb.AlertLevel.WARN)

    def close(self) -> None:
        self.run.finish()
