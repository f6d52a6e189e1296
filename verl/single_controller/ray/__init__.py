from verl.single_controller.ray.base import (
    RayClassWithInitArgs,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.single_controller.ray.pools import RayResourcePool, merge_resource_pool

__all__ = [
    "RayClassWithInitArgs",
    "RayResourcePool",
    "RayWorkerGroup",
    "create_colocated_worker_cls",
    "merge_resource_pool",
]
