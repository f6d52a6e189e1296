"""A worker group of one rank that lives in the driver's own process: no Ray, for experiments and for debugging."""

import os
from typing import Any

from verl.single_controller.base import ClassWithInitArgs, WorkerGroup
from verl.utils.profiling import marked
from verl.utils.stalls import waiting


class LocalWorkerGroup(WorkerGroup):
    """One worker, called directly. Results are those of a group of one rank; errors arrive as they were raised."""

    in_driver = True

    def __init__(self, worker: ClassWithInitArgs):
        super().__init__(world_size=1)
        # Whatever a launcher has set: this is a group of one.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        self.worker = worker()
        self._bind_worker_methods(worker.cls)

    def submit(self, rank: int, method_name: str, args: tuple, kwargs: dict) -> Any:
        """Run the call; its result is the handle."""
        name = type(self.worker).__name__
        with waiting(f"{name} has not finished {method_name}"), marked(f"{name}.{method_name}"):
            return getattr(self.worker, method_name)(*args, **kwargs)

    def wait(self, handles: list, method_name: str) -> list:
        """The handles are the results."""
        return handles
