"""The time from the command to the end of the first step, said once and kept in `run.json`.

The driver's phases follow each other and add up to it. Rank 0's are what that process did meanwhile: libraries that it
loads while the driver reads data cost the start only what the driver then still waits for them ("starting 1 rank").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from verl.config.run import Config
from verl.single_controller.base import WorkerGroup
from verl.trainer.ppo.folders import run_folder
from verl.trainer.ppo.run_record import keep_start_seconds
from verl.utils import startup
from verl.utils.console import table
from verl.utils.startup import Phase

logger = logging.getLogger(__name__)

# What took less is shown as part of the rest; run.json has it by itself. Seconds, and a share of the start.
SHORTEST_S, SMALLEST = 0.5, 0.05
REST = "rest"


def tell_start(config: Config, groups: Sequence[WorkerGroup]) -> None:
    """Say what the time went to, in the driver and in rank 0; only the first call of a run does anything.

    Args:
        groups: one per role.
    """
    concluded = startup.conclude()
    if concluded is None:
        return
    seconds, driver = concluded
    known = {phase.what for phase in driver}
    rank = dict.fromkeys(phase for group in groups for phase in group.start_phases()[0] if phase.what not in known)
    rest = Phase(REST, seconds - sum(_of_their_own(driver)), 0)
    keep_start_seconds(run_folder(config.trainer), _as_entry(seconds, [*driver, rest], list(rank)))
    least = max(SHORTEST_S, SMALLEST * seconds)
    shown = [phase for phase in driver if phase.seconds >= least]
    shown.append(Phase(REST, seconds - sum(_of_their_own(shown)), 0))
    rows = [*_rows("driver", shown), *_rows("rank 0", [phase for phase in rank if phase.seconds >= least])]
    logger.info(
        "start: %.1f s from the command to the end of the first step\n%s",
        seconds, table([["where", "what", "seconds"], *rows], left=2),
    )  # fmt: skip


def _as_entry(seconds: float, driver: list[Phase], rank: list[Phase]) -> dict[str, object]:
    """The phases as run.json has them: seconds by name, parts of others included."""
    named = {"driver": driver, "rank 0": rank}
    made = {where: {one.what: round(one.seconds, 3) for one in phases} for where, phases in named.items()}
    return {"total": round(seconds, 3), **made}


def _of_their_own(driver: list[Phase]) -> list[float]:
    """Seconds of what is neither part of another phase nor done beside one."""
    return [phase.seconds for phase in driver if phase.depth == 0 and not phase.beside]


def _rows(where: str, made: list[Phase]) -> list[list[str]]:
    return [[where, _label(one), f"{one.seconds:.1f}"] for one in made]


def _label(phase: Phase) -> str:
    return f"meanwhile: {phase.what}" if phase.beside else "  " * phase.depth + phase.what
