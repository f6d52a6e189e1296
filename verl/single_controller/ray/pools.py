"""Processes reserved in a Ray cluster, and started there before it is known what each will do."""

from __future__ import annotations

import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.base import ResourcePool
from verl.single_controller.ray.host import NETWORK, WorkerHost
from verl.single_controller.ray.nodes import choose_nodes
from verl.single_controller.ray.processes import MARK, RankProcesses
from verl.single_controller.ray.resources import check_resources, describe

# Resources are checked first, so a placement group is there within a second unless somebody else took them meanwhile.
_PLACEMENT_TIMEOUT_S = 30
# Ray's own label of a node.
NODE_ID = "ray.io/node-id"


class RayResourcePool(ResourcePool):
    """Processes reserved in the Ray cluster: one placement group per node, one bundle per process.

    Args:
        process_on_nodes: processes per node, for example [8, 8].
        use_gpu: whether each process gets a GPU besides its CPU.
        name_prefix: goes into the placement groups' names.
        max_colocate_count: how many worker groups may use the pool at the same time. Each has its own process per
            bundle, with a CPU of its own; they share the bundle's GPU. (Roles that live in one process are one group.)
    """

    def __init__(
        self,
        process_on_nodes: list[int],
        use_gpu: bool = True,
        name_prefix: str = "pool",
        max_colocate_count: int = 1,
    ) -> None:
        super().__init__(process_on_nodes, max_colocate_count)
        self.use_gpu = use_gpu
        self.name_prefix = name_prefix
        # The actors of each group that uses the pool; a group that is shut down leaves an empty list.
        self.tenants: list[list] = []
        self._placement_groups: list[PlacementGroup] | None = None
        # Calls on the groups of this pool that nobody has waited for yet, by their handles; parts of a pool share them.
        self.under_way: dict[ray.ObjectRef, Any] = {}
        # Of the bundles of each placement group those from here on; a part of a pool has some of the whole's.
        self._first = [0] * len(process_on_nodes)
        self._begun: _Begun | None = None

    def begin(self, roles: Iterable[str], prepare: Callable[[], None]) -> None:
        """Start the processes of the worker group to come, which will have these roles, and let them prepare meanwhile.
        Nothing is waited for: what goes wrong there is raised to that group.

        Raises:
            ValueError: as `get_placement_groups`.
        """
        actors, processes = _start_actors(self, roles)
        self._begun = _Begun(actors, processes, [actor.prepare.remote(prepare) for actor in actors])

    def processes_for(self, roles: Iterable[str]) -> _Begun:
        """Those that `begin` has started, once; otherwise new ones, which have nothing to prepare."""
        begun, self._begun = self._begun, None
        return begun or _Begun(*_start_actors(self, roles), [])

    def get_placement_groups(self) -> list[PlacementGroup]:
        """Reserves the processes at the first call; returns one placement group per node.

        Raises:
            ValueError: the cluster has not got what is asked for. Nothing is reserved then, and nothing waited for.
        """
        if self._placement_groups is None:
            self._placement_groups = self._reserve()
        return self._placement_groups

    def _reserve(self) -> list[PlacementGroup]:
        bundle = {"CPU": self.max_colocate_count} | ({"GPU": 1} if self.use_gpu else {})
        check_resources(self.process_on_nodes, bundle)
        # Ray refuses a name that is in use, and two pools may have one prefix.
        name = f"{self.name_prefix}_{uuid.uuid4().hex[:8]}"
        groups = [
            placement_group([bundle] * count, strategy="STRICT_PACK", name=f"{name}_node{node}", **where)
            for node, (count, where) in enumerate(zip(self.process_on_nodes, self._places(bundle), strict=True))
        ]
        if not all(group.wait(timeout_seconds=_PLACEMENT_TIMEOUT_S) for group in groups):
            text = describe(self.process_on_nodes, bundle, "What is free is spread over too many nodes, or just taken.")
            for group in groups:
                remove_placement_group(group)
            raise ValueError(text)
        return groups

    def _places(self, bundle: dict[str, float]) -> list[dict[str, Any]]:
        """Where each placement group must be: each on a node of its own; anywhere if there are too few nodes."""
        counts = self.process_on_nodes
        nodes = choose_nodes(counts, bundle) if len(counts) > 1 else None
        if nodes is None:
            return [{} for _ in counts]
        return [
            {"bundle_label_selector": [{NODE_ID: node.id}] * count} for node, count in zip(nodes, counts, strict=True)
        ]

    def bundles(self) -> list[tuple[PlacementGroup, int]]:
        """The pool's bundles, each by its placement group and its index there, in rank order."""
        places = zip(self.get_placement_groups(), self._first, self.process_on_nodes, strict=True)
        return [(group, first + index) for group, first, count in places for index in range(count)]

    def split(self, process_on_nodes: list[int]) -> tuple[RayResourcePool, RayResourcePool]:
        """Two pools on the same nodes: of the bundles of each node the first so many, and the rest.

        Raises:
            ValueError: a part would have no process on some node.
        """
        counts = list(zip(self._first, self.process_on_nodes, process_on_nodes, strict=True))
        return (
            self._part([first for first, _, _ in counts], process_on_nodes),
            self._part([first + own for first, _, own in counts], [all_ - own for _, all_, own in counts]),
        )

    def _part(self, first: list[int], process_on_nodes: list[int]) -> RayResourcePool:
        """On each node so many bundles from that one on."""
        part = RayResourcePool(process_on_nodes, self.use_gpu, self.name_prefix, self.max_colocate_count)
        part._placement_groups, part._first, part.under_way = self.get_placement_groups(), first, self.under_way
        return part

    def release(self) -> None:
        """Gives the processes back to the cluster, with one part of a pool those of all; actors in them die."""
        # Parts have one list, which the first to be released leaves empty.
        groups = self._placement_groups or []
        while groups:
            remove_placement_group(groups.pop())
        self._placement_groups = self._begun = None
        self.tenants.clear()


@dataclass(frozen=True)
class _Begun:
    """Processes that have been started, in rank order, and what they prepare before they are given workers."""

    actors: list
    processes: RankProcesses
    preparing: list[ray.ObjectRef]


def _start_actors(pool: RayResourcePool, roles: Iterable[str]) -> tuple[list, RankProcesses]:
    """Starts one WorkerHost per bundle, in rank order."""
    bundles = pool.bundles()
    in_use = sum(bool(actors) for actors in pool.tenants)
    if in_use == pool.max_colocate_count:
        raise ValueError(
            f"the pool is in use by {in_use} worker groups, as many as its max_colocate_count allows. "
            "Raise it, shut a group down, or put the roles into one group with create_colocated_worker_cls."
        )
    gpus = 1 / pool.max_colocate_count if pool.use_gpu else 0
    host = ray.remote(num_cpus=1, num_gpus=gpus)(WorkerHost)
    tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in pool.get_placement_groups()}
    nodes = [tables[group.id][index] for group, index in bundles]
    # Those of all parts of a pool, where this is one.
    per_node = Counter(node for table in tables.values() for node in table.values())
    mark = uuid.uuid4().hex
    actors = [
        host.options(scheduling_strategy=_place(*bundle), runtime_env={"env_vars": env | {MARK: mark}}).remote(
            list(roles), len(set(nodes)) == 1
        )
        for bundle, env in zip(bundles, _environments(nodes, per_node, pool.use_gpu), strict=True)
    ]
    pool.tenants.append(actors)
    return actors, RankProcesses(mark, nodes)


def _place(group: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)


def _environments(nodes: list[str], per_node: dict[str, int], use_gpu: bool) -> list[dict[str, str]]:
    """The environment variables of each rank, given its node, and the processes that share each node."""
    cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 1)) for node in ray.nodes()}
    shared = {"WORLD_SIZE": str(len(nodes)), "TOKENIZERS_PARALLELISM": "false"}
    if len(set(nodes)) == 1 and sys.platform == "linux":
        # By default gloo listens where the host's name points to, which may be a public address or nowhere, and NCCL on
        # any interface but the loopback.
        shared |= {name: os.environ.get(name, "lo") for name in NETWORK}
    else:
        shared |= {name: os.environ[name] for name in NETWORK if name in os.environ}
    environments = []
    for rank, node in enumerate(nodes):
        # Ray shows a GPU process only its own GPU, as device 0, and torch and vLLM take LOCAL_RANK for the device.
        local_rank = 0 if use_gpu else nodes[:rank].count(node)
        # Ray would set one thread per process.
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cpus[node] // per_node[node])))
        environments.append(shared | {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "OMP_NUM_THREADS": threads})
    return environments


# ---- names of verl's that nothing here calls ----


def merge_resource_pool(first: RayResourcePool, second: RayResourcePool) -> RayResourcePool:
    """Returns a pool with the processes of both, those of `first` first. It reserves nothing new.

    Raises:
        ValueError: the pools differ in use_gpu or max_colocate_count.
    """
    for name in ("use_gpu", "max_colocate_count"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(
                f"pools to merge must have the same {name}; got {getattr(first, name)} and {getattr(second, name)}."
            )
    merged = RayResourcePool(
        first.process_on_nodes + second.process_on_nodes,
        use_gpu=first.use_gpu,
        name_prefix=f"{first.name_prefix}_{second.name_prefix}",
        max_colocate_count=first.max_colocate_count,
    )
    merged._placement_groups = first.get_placement_groups() + second.get_placement_groups()
    merged._first = first._first + second._first
    return merged
