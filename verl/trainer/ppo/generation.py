"""Where the answers of a step of warmup and GAD come from: the weights that it trains, or those one update before.

`Generation` is what a step asks; `OnPolicy` has the answers written when the step begins, `OneStepOff`
(`one_step_off.py`) while the step before it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from verl.batch import Answers, LogProbs, Prompts
from verl.trainer.ppo.head_start import HeadStart
from verl.trainer.ppo.student import Student

Metrics = dict[str, float]
# `timed(name)` times the block inside.
Timed = Callable[[str], AbstractContextManager[None]]


class Generation(Protocol):
    """What a run asks of whoever has its answers written."""

    def through(self, batches: Iterator[Prompts], step: int) -> Generator[Prompts, None, None]:
        """The same batches, of which the first is this step's. To be closed when no further one is wanted."""
        ...

    def answers(self, prompts: Prompts, step: int, timed: Timed) -> tuple[Answers, Metrics]:
        """The student's answers to the batch at hand, and what is to be logged of getting them."""
        ...

    def check_sync(self, prompts: Prompts, answers: Answers, log_probs: LogProbs | None, step: int) -> Metrics:
        """Compare the engine's log-probs with the trainer's, both of the present weights (see `Student.check_sync`)."""
        ...


@dataclass(frozen=True)
class OnPolicy:
    """A step's answers are written when it begins, by the weights that it trains.

    Args:
        weighs: whether an update weighs answers by the engine's log-probs, which are reported of all then.
    """

    student: Student
    head_start: HeadStart
    weighs: bool

    def through(self, batches: Iterator[Prompts], step: int) -> Generator[Prompts, None, None]:
        yield from batches

    def answers(self, prompts: Prompts, step: int, timed: Timed) -> tuple[Answers, Metrics]:
        with timed("push_weights"):
            self.student.push_weights()
        # While the actor is frozen nothing is weighted by them.
        weighs = self.weighs and self.head_start.actor_trains(step)
        with timed("gen"):
            return self.student.answer(prompts, step, report_all=weighs), {}

    def check_sync(self, prompts: Prompts, answers: Answers, log_probs: LogProbs | None, step: int) -> Metrics:
        return self.student.check_sync(prompts, answers, log_probs, step)
