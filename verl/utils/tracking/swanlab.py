"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.utils.tracking.base import Backend, Run, Sample, earlier_run, keep_run, samples_as_markdown


class SwanlabBackend(Backend):
    """SwanLab, which takes mode, key and host from its own environment variables or login.

    Its files go to `swanlog` in the run's folder, or SWANLAB_LOG_DIR. A resumed run goes on in the earlier one's.
    """

    remote: ClassVar[bool] = True
    package: ClassVar[str | None] = "swanlab"

    @classmethod
    def check_access(cls) -> None:
        """ValueError: there is no key. SwanLab would ask for one in the middle of the run."""
        import swanlab

        settings = swanlab.Settings()
        if settings.mode == "online" and not settings.api_key:
            raise ValueError(
                "trainer.logger asks for swanlab, which has no key: run `swanlab login` or set SWANLAB_API_KEY, set "
                "SWANLAB_MODE=offline to send it later, or leave swanlab out"
            )

    def __init__(self, run: Run):
        import swanlab

        self.swanlab = swanlab
        named = earlier_run(run, "swanlab")
        self.run = swanlab.init(
            project=run.project,
            experiment_name=run.experiment,
            config=dict(run.config),
            log_dir=None if "SWANLAB_LOG_DIR" in os.environ else str(run.log_dir / "swanlog"),
            id=named,
            resume=None if named is None else "allow",
        )
        keep_run(run, "swanlab", self.run.id)

    def log(self, data: Mapping[str, float], step: int) -> None:
        self.run.log(dict(data), step=step)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.run.log({"val/generations": self.swanlab.Text(samples_as_markdown(samples))}, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        self.run.log({f"alarms/{title}": self.swanlab.Text(text)}, step=step)

    def close(self) -> None:
        if self.run.alive:
            self.run.finish()
