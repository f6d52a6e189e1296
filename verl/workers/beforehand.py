"""What a rank's process does while the driver still looks at models and data, before it is told its part: the libraries
are loaded, the engine's too, and the first rank, which reads the weights, begins to.

Models, optimizers and the engine itself are built later and one after another. Fresh score heads and adapters are drawn
in that order from one generator; ranks meet in collectives, in one order; and an engine measures the device's memory
while it is built, which nothing may change meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial

import psutil

from verl.config.run import Config
from verl.memory.estimate import host_memory
from verl.models.layers import compiler_as_before
from verl.models.reading_ahead import read_ahead
from verl.utils.startup import note, noted
from verl.workers.rollout import get_rollout_class

# Of the machine's memory; the rest is for the models that are built of it.
SHARE_READ_AHEAD = 0.5


def preparing(config: Config, classes: Sequence[type], engine: bool) -> partial[None]:
    """A function to call in the processes of a run's ranks.

    Args:
        classes: of the workers, whose modules a process loads when the function arrives there.
        engine: whether they have one.
    """
    policy, critic = config.actor_rollout_ref, config.critic
    models = [policy.model] + ([critic.model] if config.use_critic else [])
    # A copy in shared memory is made and read by whoever loads the model.
    paths = [model.path for model in models if not model.use_shm]
    return partial(_prepare, tuple(classes), paths, policy.rollout.name if engine else None)


def _prepare(classes: tuple[type, ...], paths: Sequence[str], engine: str | None) -> None:
    note("loading libraries", time.time() - psutil.Process().create_time())
    if int(os.environ["RANK"]) == 0:
        read_ahead(paths, SHARE_READ_AHEAD * host_memory())
    if engine is not None:
        with noted(f"loading the {engine} engine's libraries"), compiler_as_before():
            get_rollout_class(engine)
