"""What every worker process knows about itself: its rank, its node, where rank 0 listens, its data-parallel places."""

from __future__ import annotations

import os
from collections.abc import Mapping

from verl.single_controller.base.decorator import Dispatch, register


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise RuntimeError(
            f"the environment variable {name} is not set. RayWorkerGroup sets it for the workers it starts; "
            "to use a Worker alone, set RANK=0 WORLD_SIZE=1 LOCAL_RANK=0."
        )
    return os.environ[name]


class Worker:
    """Base class of all workers. One instance per role and rank; several roles may share a process: `colocated` has
    them all by role, once they are built.

    Raises RuntimeError when RANK, WORLD_SIZE or LOCAL_RANK is missing from the environment.
    """

    def __init__(self) -> None:
        self._rank = int(_from_environment("RANK"))
        self._world_size = int(_from_environment("WORLD_SIZE"))
        self._local_rank = int(_from_environment("LOCAL_RANK"))
        self._places: dict[str, tuple[int, bool]] = {}
        self.colocated: Mapping[str, Worker] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def local_rank(self) -> int:
        """The index of this process's device among those it can see.

        Ray shows each GPU process its own GPU only, so it is 0 there; on CPU it is the rank within the node.
        """
        return self._local_rank

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

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def query_dispatch_info(self, mesh_name: str) -> tuple[int, bool]:
        """Returns this rank's (dp_rank, is_collect) in the mesh. Raises ValueError for an unknown mesh."""
        if mesh_name not in self._places:
            raise ValueError(
                f"{type(self).__name__} has no mesh {mesh_name!r}; known: {sorted(self._places)}. "
                "Call register_dispatch_collect_info in its __init__ or in init_model."
            )
        return self._places[mesh_name]

    # ---- names of verl's that nothing here calls ----

    def get_master_addr_port(self) -> tuple[str, int]:
        """Where rank 0 of this group listens for torch.distributed."""
        return _from_environment("MASTER_ADDR"), int(_from_environment("MASTER_PORT"))


def colocate(workers: Mapping[str, Worker]) -> None:
    """Let the workers of one process, by role, know each other."""
    for worker in workers.values():
        worker.colocated = workers
