"""Roles of worker processes, and which processes a run asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from verl.single_controller.ray import RayResourcePool


class Role(Enum):
    """What a group of workers does; the policy's processes also generate and hold the frozen reference."""

    ActorRollout = "actor_rollout"
    Critic = "critic"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ResourcePoolManager:
    """Which processes there are (`resource_pool_spec`: pool name -> processes per node) and which role gets which."""

    resource_pool_spec: dict[str, list[int]]
    mapping: dict[Role, str]
    use_gpu: bool = False

    def create_resource_pool(self) -> dict[str, RayResourcePool]:
        """The pools by name; ValueError at once if the cluster cannot hold them."""
        pools = {
            name: RayResourcePool(processes, use_gpu=self.use_gpu, name_prefix=name)
            for name, processes in self.resource_pool_spec.items()
        }
        for pool in pools.values():
            pool.get_placement_groups()
        return pools

    # ---- names of verl's that nothing here calls ----

    def get_n_gpus(self) -> int:
        """Processes of all pools; on GPU nodes each has a GPU."""
        return sum(sum(processes) for processes in self.resource_pool_spec.values())
