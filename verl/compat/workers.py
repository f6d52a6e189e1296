"""Verl's methods of worker groups: calls of a method by its name."""

from typing import Any


class WorkerGroupMethods:
    """Methods of a WorkerGroup, which has `submit` and `wait`."""

    world_size: int

    def execute_all_async(self, method_name: str, *args: Any, **kwargs: Any) -> list:
        """Starts the method with the same arguments on every rank; returns the handles in rank order."""
        return [self.submit(rank, method_name, args, kwargs) for rank in range(self.world_size)]

    def execute_all_sync(self, method_name: str, *args: Any, **kwargs: Any) -> list:
        """Runs the method with the same arguments on every rank; returns the answers in rank order."""
        return self.wait(self.execute_all_async(method_name, *args, **kwargs), method_name)

    def execute_rank_zero_async(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Starts the method on rank 0; returns its handle."""
        return self.submit(0, method_name, args, kwargs)

    def execute_rank_zero_sync(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs the method on rank 0; returns its answer."""
        return self.wait([self.execute_rank_zero_async(method_name, *args, **kwargs)], method_name)[0]
