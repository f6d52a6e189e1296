"""Verl's methods of workers and of worker groups: meshes of ranks, and calls of a method by its name.

A mesh says which ranks form a data-parallel group of more than one rank (`make_nd_compute_dataproto_dispatch_fn`).
"""

from typing import Any


class WorkerMethods:
    """Methods of a Worker."""

    rank: int
    _places: dict[str, tuple[int, bool]]

    def register_dispatch_collect_info(self, mesh_name: str, dp_rank: int, is_collect: bool) -> None:
        """Says which chunk of a batch this rank works on, and whether the driver takes the answer from here.

        Args:
            mesh_name: the name given to `make_nd_compute_dataproto_dispatch_fn`.
            dp_rank: this rank's data-parallel group; all ranks of one group get the same chunk.
            is_collect: true on exactly one rank of each group.

        Raises:
            ValueError: the mesh was registered before.
        """
        if mesh_name in self._places:
            raise ValueError(f"mesh {mesh_name!r} is registered already on rank {self.rank}: register each mesh once.")
        self._places[mesh_name] = (dp_rank, is_collect)

    def query_dispatch_info(self, mesh_name: str) -> tuple[int, bool]:
        """Returns this rank's (dp_rank, is_collect) in the mesh. Raises ValueError for an unknown mesh."""
        if mesh_name not in self._places:
            raise ValueError(
                f"{type(self).__name__} has no mesh {mesh_name!r}; known: {sorted(self._places)}. "
                "Call register_dispatch_collect_info in its __init__ or in init_model."
            )
        return self._places[mesh_name]


class WorkerGroupMethods:
    """Methods of a WorkerGroup, which has `submit` and `wait`."""

    world_size: int
    _places: dict[str, list[tuple[int, bool]]]

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

    def mesh_places(self, mesh_name: str) -> list[tuple[int, bool]]:
        """Returns (dp_rank, is_collect) of each rank, asked of the workers once.

        Raises:
            ValueError: the data-parallel ranks are not 0, 1, 2, ... with exactly one collecting rank each.
        """
        if mesh_name not in self._places:
            places = self.execute_all_sync("query_dispatch_info", mesh_name)
            collecting = sorted(dp_rank for dp_rank, is_collect in places if is_collect)
            if collecting != list(range(len({dp_rank for dp_rank, _ in places}))):
                raise ValueError(
                    f"mesh {mesh_name!r}: expected data-parallel ranks 0, 1, 2, ... with one collecting rank each, got "
                    f"(dp_rank, is_collect) by rank: {places}. Correct the register_dispatch_collect_info calls."
                )
            self._places[mesh_name] = places
        return self._places[mesh_name]
