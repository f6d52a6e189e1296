"""The discriminator's head start: the steps in which it learns and the actor does not.

`trainer.critic_warmup=N` is N steps. `trainer.critic_warmup=auto` lasts until the discriminator tells held-out pairs
apart (`critic.head_start`), or ends the run with a sentence: a student that is trained on the scores of a discriminator
that knows nothing is trained on noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from verl.config.run import Config
from verl.trainer.ppo.held_out import HeldOutAccuracy
from verl.utils.run_log import phase

logger = logging.getLogger(__name__)


class DiscriminatorCouldNotLearn(RuntimeError):
    """The head start is over, and held-out pairs are still not told apart."""


class HeadStart:
    """When the actor begins to learn.

    Args:
        config: the run's.
        accuracy: measures the discriminator on stored held-out pairs; None without a held-out set.
        total_steps: of the run; a head start that fills it is one that failed.

    `first_actor_step` (None while an automatic head start goes on) and `held`, the checks in a row that passed, are
    its state.
    """

    def __init__(self, config: Config, accuracy: Callable[[], HeldOutAccuracy] | None, total_steps: int):
        self.config = config.critic.head_start
        self.last_check = min(self.config.max_steps, total_steps - 1)
        # A warmup by SFT trains the actor on no score, and a validation trains nothing.
        self.scores_train = not (config.use_sft or config.trainer.val_only)
        self.auto = config.trainer.critic_warmup == "auto"
        self.learning_rate = config.critic.optim.lr
        self.accuracy = accuracy
        self.first_actor_step = None if self.auto else config.frozen_actor_steps
        self.held = 0

    def actor_trains(self, step: int) -> bool:
        """Whether the actor is updated in a step."""
        return self.first_actor_step is not None and self.first_actor_step <= step

    def check(self, step: int) -> dict[str, float]:
        """Before a step of an automatic head start: see whether it is over. Returns what was measured, if it was.

        Raises:
            DiscriminatorCouldNotLearn: `max_steps`, or all steps of the run but one, have passed.
        """
        config = self.config
        due = step > 0 and (step % config.check_every == 0 or step >= self.last_check)
        if self.first_actor_step is not None or not due:
            return {}
        accuracy, _, prompts = self.accuracy()
        held = self.held + 1 if accuracy >= config.accuracy else 0
        if held < config.checks and step >= self.last_check:
            raise DiscriminatorCouldNotLearn(
                f"after {step} steps of head start the discriminator tells {accuracy:.2f} of the pairs of {prompts} "
                f"held-out prompts apart; critic.head_start.accuracy={config.accuracy} was to hold for "
                f"{config.checks} checks. Either the student writes like the teacher already, and an adversary has "
                "nothing to teach it: stop here. Or the discriminator learns too slowly or not at all: raise "
                f"critic.head_start.max_steps={config.max_steps} (or trainer.total_training_steps) and "
                f"critic.optim.lr={self.learning_rate} (5 to 10 times), or try another critic.discriminator.loss as "
                "well; the same command with such changes goes on from here"
            )
        self.held = held
        if held >= config.checks:
            self.first_actor_step = step
            logger.info(
                "step %d: the discriminator tells %.2f of the pairs of %d held-out prompts apart (%d checks in a row "
                "at %.2f or more): the head start is over, the student learns from now on",
                step, accuracy, prompts, self.held, config.accuracy,
            )  # fmt: skip
        return {"critic/head_start/d_acc": accuracy, "critic/head_start/checks_held": self.held}

    def state(self) -> dict[str, int | None]:
        """What a resumed run has to know, by its names in the run's state; nothing of a head start of fixed length."""
        if not self.auto:
            return {}
        return {"first_actor_step": self.first_actor_step, "head_start_held": self.held}

    def conclude(self, held_out: Callable[[], HeldOutAccuracy] | None, in_training: float | None) -> None:
        """At the end of a warmup of fixed length: say whether the discriminator has learned enough to teach, and what
        to do if not.

        Args:
            held_out: measures it on the present student's answers, which the next stage begins with.
            in_training: the share of training pairs that it told apart of late, which has to do without a held-out set.
        """
        if self.auto or (held_out is None and in_training is None):
            return
        accuracy, error, pairs = in_training, 0.0, "of the training pairs, which it has learned from,"
        if held_out is not None:
            accuracy, error, prompts = held_out()
            pairs = f"(standard error {error:.2f}) of the pairs of {prompts} held-out prompts"
        threshold = f"critic.head_start.accuracy={self.config.accuracy}"
        falls_short = f"less than {threshold}" if accuracy < self.config.accuracy else "which may be guessing"
        # What one draw of answers cannot tell from the threshold is no failure. Where fewer than two standard errors
        # are above 0.5, GAD would warn of it.
        if accuracy + error >= self.config.accuracy and accuracy - 2 * error >= 0.5:
            reached = f"{threshold} or more" if accuracy >= self.config.accuracy else f"{threshold} within that error"
            logger.info(
                "warmup worked: the discriminator tells %.3f %s apart, %s: go on with GAD", accuracy, pairs, reached
            )
            return
        logger.warning(
            "warmup did not work: the discriminator tells %.3f %s apart, %s: its scores would train the "
            "student on noise. Give it more steps (trainer.critic_warmup and trainer.total_training_steps; the same "
            "command goes on from here) or a higher critic.optim.lr=%s (5 to 10 times), or let it take as long as it "
            "needs (trainer.critic_warmup=auto). Or the student writes like the teacher already, and an adversary has "
            "nothing to teach it: stop here",
            accuracy, pairs, falls_short, self.learning_rate,
        )  # fmt: skip

    def warn_of_a_blind_critic(self) -> None:
        """Before the first step of a run that trains the actor at once: say so if the critic that it was given does not
        tell held-out pairs apart by two standard errors."""
        if self.accuracy is None or self.first_actor_step != 0 or not self.scores_train:
            return
        with phase("scoring the held-out answers"):
            accuracy, error, prompts = self.accuracy()
        if accuracy - 2 * error < 0.5:
            logger.warning(
                "the discriminator tells %.2f (standard error %.2f) of the pairs of %d held-out prompts apart, which "
                "may be guessing: its scores would train the student on noise. Let it learn first: "
                "trainer.critic_warmup=auto, or a longer warmup stage with a higher critic.optim.lr",
                accuracy, error, prompts,
            )  # fmt: skip
