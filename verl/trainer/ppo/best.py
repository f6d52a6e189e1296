"""The best validation so far, and when to end a run for want of better ones; decided from numbers alone."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from verl.config.run import Config
from verl.utils.checkpoint.best_link import try_best_link

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestState:
    """What a resumed run has to know of the validations so far.

    metric, mode: what was compared.
    step, value: the best one, of the weights after `step` updates; None before there is one.
    validated: step of the last validation compared: made once more after resuming, it does not count once more.
    misses: validations since the best one, in a row, that were no better.
    """

    metric: str
    mode: str
    step: int | None = None
    value: float | None = None
    validated: int = -1
    misses: int = 0


class BestTracker:
    """Compares validations. Ties go to the earlier one, and what is not a number is never the best.

    Args:
        metric: name of the validation metric.
        mode: `max` or `min`, what is better.
        patience: validations in a row without a better one after which it is `exhausted`; None: never.
        counts_from: validations of earlier steps do not count for the patience.
    """

    def __init__(self, metric: str, mode: str, patience: int | None = None, counts_from: float = 0):
        self.patience = patience
        self.counts_from = counts_from
        self.state = BestState(metric, mode)

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Compare the validation of the weights after `step` updates; whether it is the best so far.

        Raises:
            ValueError: the metric is not among `metrics`; names those that are, the most alike first.
        """
        state = self.state
        value = self._value(metrics)
        if step <= state.validated:
            return False
        if math.isnan(value) or not (state.value is None or self._better(value, state.value)):
            self.state = replace(state, validated=step, misses=state.misses + (step >= self.counts_from))
            return False
        self.state = replace(state, step=step, value=value, validated=step, misses=0)
        return True

    def decide(
        self, step: int, metrics: Mapping[str, float], total_steps: int, first_actor_step: int | None
    ) -> tuple[bool, bool]:
        """`see`, with what follows from it said: whether these weights are the best so far, and whether the run ends
        with them, before the last of its `total_steps`.

        Args:
            first_actor_step: see `first_that_counts`.
        """
        self.counts_from = first_that_counts(self.state.metric, first_actor_step)
        is_best = self.see(step, metrics)
        ends = self.exhausted and step < total_steps
        if is_best:
            logger.info("step %d is the best so far: %s is %.6g", step, self.state.metric, self.state.value)
        if ends:
            verdict = self.verdict(metrics[self.state.metric])
            logger.info("early stop after %d of %d steps: %s", step, total_steps, verdict)
        return is_best, ends

    def _value(self, metrics: Mapping[str, float]) -> float:
        name = self.state.metric
        if name not in metrics:
            known = sorted(metrics, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
            raise ValueError(f"trainer.best_metric={name} is not measured by this validation; use {', '.join(known)}")
        return float(metrics[name])

    def _better(self, value: float, other: float) -> bool:
        return value > other if self.state.mode == "max" else value < other

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.state.misses >= self.patience

    def metrics(self) -> dict[str, float]:
        """`val/best/value` and `val/best/step`, once there is a best."""
        if self.state.step is None:
            return {}
        return {"val/best/value": self.state.value, "val/best/step": self.state.step}

    def load(self, state: BestState | None) -> None:
        """Go on from a checkpoint's state, if it compared the same thing."""
        if state is None:
            return
        if (state.metric, state.mode) == (self.state.metric, self.state.mode):
            self.state = state
            return
        logger.warning(
            "the checkpoint's best was by %s (%s), and trainer.best_metric is now %s (%s): it is looked for anew",
            state.metric, state.mode, self.state.metric, self.state.mode,
        )  # fmt: skip

    def verdict(self, value: float) -> str:
        """Why the run ends, after a last validation of `value`."""
        state = self.state
        if state.value is None:
            return f"{state.metric} was not a number in {state.misses} validations in a row"
        return (
            f"{state.metric} was best at step {state.step}, {state.value:.6g}; now it is {value:.6g}, worse by "
            f"{abs(value - state.value):.6g} (validations in a row without a better one: {state.misses})"
        )


def open_best(config: Config) -> BestTracker | None:
    """The tracker that `trainer.best_metric` asks for; None without one, or if the run is to look and leave nothing.

    Raises:
        OSError: `best/` cannot be made where the checkpoints go.
    """
    trainer = config.trainer
    if trainer.best_metric is None or trainer.val_only:
        return None
    try_best_link(Path(trainer.default_local_dir).expanduser().absolute())
    return BestTracker(trainer.best_metric, trainer.best_mode, trainer.early_stop_patience)


def first_that_counts(metric: str, first_actor_step: int | None) -> float:
    """The first validation to count for the patience: those of a frozen actor repeat the first one.

    Args:
        first_actor_step: the first step that trains the actor; None while the discriminator's head start goes on.
    """
    if metric.startswith("val/critic/"):
        return 0
    return math.inf if first_actor_step is None else first_actor_step + 1
