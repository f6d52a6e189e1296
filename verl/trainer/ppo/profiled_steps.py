"""The steps that are traced (`trainer.profile_steps`): every rank and the driver, for Perfetto and in tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from verl.config.run import Config
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.folders import run_folder
from verl.utils.profiling import Trace
from verl.utils.units import counted

logger = logging.getLogger(__name__)

FOLDER = "profiles"


def check_profile_steps(config: Config, total_steps: int, first_step: int) -> None:
    """See that the steps to be traced are made by this run.

    Args:
        first_step: of this run; those before it, which an earlier one made, are said and left out.

    Raises:
        ValueError: the run ends before.
    """
    steps = config.trainer.profile_steps or []
    beyond = [step for step in steps if step >= total_steps]
    if beyond:
        raise ValueError(
            f"trainer.profile_steps={steps}: expected steps of 0 to {total_steps - 1}, of which this run has "
            f"{total_steps}, got {', '.join(map(str, beyond))}; they are counted as in metrics.jsonl, from 0"
        )
    made = [str(step) for step in steps if step < first_step]
    if made:
        logger.warning(
            "trainer.profile_steps=%s: the run goes on at step %d, so that %s made already and not traced",
            steps, first_step, f"{', '.join(made)} {'is' if len(made) == 1 else 'are'}",
        )  # fmt: skip


class ProfiledSteps:
    """Traces the steps that the settings name, and leaves all others alone.

    Args:
        groups: of the run's ranks, the first of which is asked: roles of a rank share its process.
    """

    def __init__(self, config: Config, groups: Sequence[WorkerGroup]):
        self.steps = frozenset(config.trainer.profile_steps or ())
        self.folder = run_folder(config.trainer) / FOLDER
        self.device = config.trainer.device
        self.groups = groups

    @property
    def workers(self) -> WorkerGroup:
        return self.groups[0]

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Trace the block, which is this step's, if it is one of them, and say where the files are."""
        if step not in self.steps:
            yield
            return
        folder = self.folder / f"step_{step}"
        if self.workers.in_driver:
            with Trace(self.device) as trace:
                yield
            trace.keep(folder, "rank_0", "rank 0 of 1, with the driver")
        else:
            self.workers.begin_trace()
            with Trace("cpu") as trace:
                yield
            self.workers.end_trace(str(folder))
            trace.keep(folder, "driver", "driver")
        self._say(step, folder)

    def _say(self, step: int, folder: Path) -> None:
        ranks = counted(self.workers.world_size, "rank")
        logger.info(
            "step %d is profiled: %s has traces of %s for https://ui.perfetto.dev or chrome://tracing (*.json.gz), "
            "with tables of what took the time (*.txt)",
            step, folder, ranks if self.workers.in_driver else f"{ranks} and of the driver",
        )  # fmt: skip
