"""A brake on a discriminator that wins, and a push for one that cannot follow.

Where the discriminator tells nearly every pair apart, its scores say how an answer was made and no longer which of the
student's answers are better; where it tells none, they are noise. Its accuracy on fresh answers, before the update, is
kept in a band: above it a step only scores, below it a step trains one epoch more.
"""

from __future__ import annotations

from verl.config.critic import BalanceConfig


class DiscriminatorBalance:
    """The number of epochs that each step trains the discriminator, from its accuracy in the steps before.

    Args:
        config: the band and the smoothing.
        epochs: those of a step while the accuracy is within the band.

    `accuracy` is the smoothed accuracy, None before the first step; it is all the state there is.
    """

    def __init__(self, config: BalanceConfig, epochs: int):
        self.config = config
        self.usual_epochs = epochs
        self.accuracy: float | None = None

    def epochs(self) -> int:
        """The epochs that the next step trains; 0: it only scores."""
        config = self.config
        if not config.enable or self.accuracy is None:
            return self.usual_epochs
        if self.accuracy > config.highest:
            return 0
        return self.usual_epochs + (self.accuracy < config.lowest)

    def observe(self, accuracy: float) -> None:
        """Take in `critic/d_acc` of a step's fresh answers, before its update."""
        keep = self.config.smoothing if self.accuracy is not None else 0.0
        self.accuracy = keep * (self.accuracy or 0.0) + (1 - keep) * accuracy
