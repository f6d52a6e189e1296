"""The driver's handle on the engine that writes the student's answers: in the ranks that train, or in its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup


class Engine(Protocol):
    """Answers prompts from the weights that it was given last."""

    # How many ranks share the prompts of a call.
    ranks: int
    # Whether it has to be given weights for every call.
    drops_weights: bool

    def push(self) -> None:
        """Give it the policy's present weights."""
        ...

    def generate(self, prompts: DataProto) -> DataProto:
        """Answers, once they are all there."""
        ...


class SharedEngine:
    """In the processes that train.

    Args:
        workers: a group of `ActorRolloutRefWorker`.
    """

    def __init__(self, workers: WorkerGroup, drops_weights: bool):
        self.workers, self.drops_weights = workers, drops_weights

    @property
    def ranks(self) -> int:
        return self.workers.world_size

    def push(self) -> None:
        self.workers.push_weights()

    def generate(self, prompts: DataProto) -> DataProto:
        return self.workers.generate_sequences(prompts)


class OwnEngine:
    """In processes of its own, which write while others train; it keeps its weights.

    Args:
        workers: the group that trains, of `ActorRolloutRefWorker`.
        engines: a group of `RolloutWorker`.
    """

    drops_weights = False

    def __init__(self, workers: WorkerGroup, engines: WorkerGroup):
        self.workers, self.engines = workers, engines

    @property
    def ranks(self) -> int:
        return self.engines.world_size

    def connect(self) -> None:
        """Let the engine's ranks and the first one that trains meet, once both are built."""
        address, port = self.workers.offer_weights()
        asking = self.engines.ask_for_weights(address, port)
        self.workers.open_line(address, port, self.ranks)
        asking.get()

    def push(self) -> None:
        """After what it was told to write before, which it writes to the end with the weights that it has."""
        receiving = self.engines.receive_weights()
        self.workers.send_weights()
        receiving.get()

    def begin(self, prompts: DataProto) -> Callable[[], DataProto]:
        """Let it write; what is returned waits for the answers."""
        return self.engines.generate_sequences(prompts).get

    def generate(self, prompts: DataProto) -> DataProto:
        return self.begin(prompts)()
