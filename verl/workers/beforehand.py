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

import psutil

from verl.memory.estimate import host_memory
from verl.models.layers import compiler_as_before
from verl.models.reading_ahead import read_ahead
from verl.utils.named import loaded
from verl.utils.startup import note, noted
from verl.workers.rollout import get_rollout_class

# Of the machine's memory; the rest is for the models that are built of it.
SHARE_READ_AHEAD = 0.5


def prepare(classes: Sequence[type | str], paths: Sequence[str], engine: str | None) -> None:
    """To be called in the process of a rank.

    Args:
        classes: of the workers, or their names, which are loaded here.
        paths: of the models whose weights the first rank reads.
        engine: the one that this process will have, if any.
    """
    for one in classes:
        loaded(one)
    note("loading libraries", time.time() - psutil.Process().create_time())
    if int(os.environ["RANK"]) == 0:
        read_ahead(paths, SHARE_READ_AHEAD * host_memory())
    if engine is not None:
        with noted(f"loading the {engine} engine's libraries"), compiler_as_before():
            get_rollout_class(engine)
