"""Worker groups on Ray: one process per rank, each with its own CPU and GPU, one or several roles in each process."""

import logging
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.single_controller.base import ClassWithInitArgs, ResourcePool, Worker, WorkerGroup
from verl.single_controller.ray.host import NETWORK, WorkerHost
from verl.single_controller.ray.nodes import Node, all_nodes, choose_nodes
from verl.single_controller.ray.processes import MARK, RankProcesses
from verl.single_controller.ray.resources import check_resources, describe
from verl.utils.stalls import waiting

logger = logging.getLogger(__name__)

# Resources are checked first, so a placement group is there within a second unless somebody else took them meanwhile.
_PLACEMENT_TIMEOUT_S = 30
# When a rank dies, its neighbours' collectives fail too, and their error may arrive first.
_CAUSE_GRACE_S = 2.0
# When a node is lost, its neighbours notice at once, and Ray after five of its looks, three seconds apart.
_NODE_GRACE_S = 30.0
# Ray's own label of a node.
NODE_ID = "ray.io/node-id"
# What ends a process from outside. The second one is Ray's own, before the kernel does it.
_DEATHS = (RayActorError, OutOfMemoryError)
_OUT_OF_MEMORY_ADVICE = (
    "Where a process ends without a word of its own, the machine's memory was full most often (`dmesg` says so): use "
    "fewer ranks on a machine (trainer.n_gpus_per_node), shorter or smaller batches, or let less rest in its memory "
    "(fsdp_config: param_offload, optimizer_offload)"
)


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
        self.under_way: dict[ray.ObjectRef, _Call] = {}
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

    def processes_for(self, roles: Iterable[str]) -> "_Begun":
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

    def split(self, process_on_nodes: list[int]) -> tuple["RayResourcePool", "RayResourcePool"]:
        """Two pools on the same nodes: of the bundles of each node the first so many, and the rest.

        Raises:
            ValueError: a part would have no process on some node.
        """
        counts = list(zip(self._first, self.process_on_nodes, process_on_nodes, strict=True))
        return (
            self._part([first for first, _, _ in counts], process_on_nodes),
            self._part([first + own for first, _, own in counts], [all_ - own for _, all_, own in counts]),
        )

    def _part(self, first: list[int], process_on_nodes: list[int]) -> "RayResourcePool":
        """On each node so many bundles from that one on."""
        part = RayResourcePool(process_on_nodes, self.use_gpu, self.name_prefix, self.max_colocate_count)
        part._placement_groups, part._first, part.under_way = self.get_placement_groups(), first, self.under_way
        return part

    def release(self) -> None:
        """Gives the processes back to the cluster; actors that still run in them die."""
        for group in self._placement_groups or []:
            remove_placement_group(group)
        self._placement_groups = self._begun = None
        self.tenants.clear()


@dataclass(frozen=True)
class _Begun:
    """Processes that have been started, in rank order, and what they prepare before they are given workers."""

    actors: list
    processes: RankProcesses
    preparing: list[ray.ObjectRef]


class RayClassWithInitArgs(ClassWithInitArgs):
    """A worker class, plain or wrapped by `ray.remote`, and the arguments of its constructor."""

    def __init__(self, cls: type, *args: Any, **kwargs: Any) -> None:
        super().__init__(getattr(cls, "__ray_actor_class__", cls), *args, **kwargs)


@dataclass(frozen=True)
class ColocatedClasses:
    """Worker classes by role that will share one process per rank."""

    roles: dict[str, RayClassWithInitArgs]


def create_colocated_worker_cls(class_dict: dict[str, RayClassWithInitArgs]) -> ColocatedClasses:
    """Puts several roles into one process per rank. `RayWorkerGroup(pool, result).spawn(roles)` gives a group for each.

    Raises:
        ValueError: there is no role.
        TypeError: a class is not a Worker.
    """
    if not class_dict:
        raise ValueError("class_dict: expected at least one role, got none.")
    for role, cls_with_args in class_dict.items():
        if not issubclass(cls_with_args.cls, Worker):
            raise TypeError(f"role {role!r}: expected a subclass of Worker, got {cls_with_args.cls.__name__}.")
    return ColocatedClasses(dict(class_dict))


@dataclass(frozen=True)
class _Call:
    """A call on one group that goes on while the thread that began it does other things."""

    group: "RayWorkerGroup"
    method_name: str
    handles: list[ray.ObjectRef]
    thread: int


class RayWorkerGroup(WorkerGroup):
    """Starts one process per bundle of a pool and calls their workers.

    For a single class the group has that class's registered methods; for colocated classes `spawn` gives such a group
    for each role.

    Args:
        resource_pool: where to start.
        ray_cls_with_init: what to construct in each process.

    Raises:
        ValueError: the cluster is too small, or the pool is in use by as many groups as it allows.
        Exception: what a worker's constructor raised.
        RayActorError: a process died; the message says which.
    """

    def __init__(
        self, resource_pool: RayResourcePool, ray_cls_with_init: RayClassWithInitArgs | ColocatedClasses
    ) -> None:
        super().__init__(resource_pool.world_size)
        if isinstance(ray_cls_with_init, ColocatedClasses):
            self._role, self._roles = None, ray_cls_with_init.roles
        else:
            self._role = ray_cls_with_init.cls.__name__
            self._roles = {self._role: ray_cls_with_init}
            self._bind_worker_methods(ray_cls_with_init.cls)
        self._under_way = resource_pool.under_way
        begun = resource_pool.processes_for(self._roles)
        self._actors, self._processes = begun.actors, begun.processes
        try:
            self.wait(begun.preparing, "__init__")
            [place] = self.wait([self._actors[0].meeting_place.remote()], "__init__")
            self.wait([actor.build.remote(self._roles, *place) for actor in self._actors], "__init__")
        except BaseException:
            self.shutdown()
            raise

    def spawn(self, prefix_set: Iterable[str]) -> dict[str, "RayWorkerGroup"]:
        """Returns, for each role of colocated classes, a group with that role's methods over the same processes.

        Raises:
            ValueError: a role is not among the colocated ones.
        """
        roles = list(prefix_set)
        unknown = sorted(set(roles) - self._roles.keys())
        if unknown:
            raise ValueError(f"unknown roles {unknown}; this group was created with {sorted(self._roles)}.")
        return {role: self._view(role) for role in roles}

    def _view(self, role: str) -> "RayWorkerGroup":
        view = object.__new__(type(self))
        WorkerGroup.__init__(view, self.world_size)
        view._role, view._roles, view._actors, view._processes = role, self._roles, self._actors, self._processes
        view._under_way = self._under_way
        view._bind_worker_methods(self._roles[role].cls)
        return view

    def submit(self, rank: int, method_name: str, args: tuple, kwargs: dict) -> ray.ObjectRef:
        """Starts a call on one rank. Raises ValueError on a group of colocated roles, which has to be told the role."""
        if self._role is None:
            roles = sorted(self._roles)
            raise ValueError(
                f"cannot call {method_name} on the roles {roles} at once: call it on one of spawn({roles})."
            )
        return self._actors[rank].call.remote(self._role, method_name, *args, **kwargs)

    def goes_on(self, handles: list[ray.ObjectRef], method_name: str) -> None:
        """Whatever this thread waits for of the pool from here on, it also sees whether this call has failed."""
        call = _Call(self, method_name, handles, threading.get_ident())
        self._under_way.update(dict.fromkeys(handles, call))

    def _see_others(self, done: ray.ObjectRef) -> None:
        """Raise what a call that goes on has failed of, one of whose ranks has answered."""
        call = self._under_way.pop(done)
        ranks = {handle: rank for rank, handle in enumerate(call.handles)}
        try:
            ray.get(done)
        except Exception as error:
            pending = {rank: handle for handle, rank in ranks.items() if handle in self._under_way}
            raise call.group._cause(ranks[done], error, pending, call.method_name) from None

    def wait(self, handles: list[ray.ObjectRef], method_name: str) -> list:
        """Returns the results of one call, given its handles from rank 0 on.

        Raises:
            Exception: what the first failing rank raised, with its traceback, though others may still be at work; of
                this call, or of another that goes on.
            RayActorError: a process died; the message says which.
        """
        ranks = {handle: rank for rank, handle in enumerate(handles)}
        results: dict[int, Any] = {}
        for handle in handles:
            self._under_way.pop(handle, None)
        with waiting(lambda: self._all_unanswered(sorted(set(ranks.values()) - results.keys()), method_name)):
            pending = handles
            while pending:
                others = [handle for handle, call in self._under_way.items() if call.thread == threading.get_ident()]
                (ready,), _ = ray.wait([*pending, *others], num_returns=1)
                if ready not in ranks:
                    self._see_others(ready)
                    continue
                pending = [handle for handle in pending if handle != ready]
                try:
                    results[ranks[ready]] = ray.get(ready)
                except Exception as error:
                    raise self._cause(
                        ranks[ready], error, {ranks[handle]: handle for handle in pending}, method_name
                    ) from None
        return [results[rank] for rank in range(len(handles))]

    @property
    def _name(self) -> str:
        return "+".join(self._roles) if self._role is None else self._role

    @property
    def _on_one_node(self) -> bool:
        return len(set(self._processes.nodes)) == 1

    def _lost_node(self, rank: int) -> Node | None:
        """The node of a rank that does not answer, if it is gone; Ray takes its time to know."""
        deadline = time.monotonic() + _NODE_GRACE_S
        while not self._on_one_node and time.monotonic() < deadline:
            node = next((node for node in all_nodes() if node.id == self._processes.nodes[rank]), None)
            if node is not None and not node.alive:
                return node
            time.sleep(0.5)
        return None

    def _all_unanswered(self, ranks: list[int], method_name: str) -> str:
        """`_unanswered`, and the calls that go on beside it, which it may wait for."""
        # A copy: another thread, the watch's, asks.
        calls = {id(call): call for call in list(self._under_way.values())}
        texts = [self._unanswered(ranks, method_name)]
        for call in calls.values():
            there = [rank for rank, handle in enumerate(call.handles) if handle in self._under_way]
            texts.append(call.group._unanswered(there, call.method_name))
        return "; ".join(texts)

    def _unanswered(self, ranks: list[int], method_name: str) -> str:
        """That these ranks have not answered; first those whose processes stand still, as others may wait for them."""
        stuck = self._processes.stuck(ranks)
        first = sorted(stuck) or ranks
        states = f" ({', '.join(stuck[rank] for rank in first)})" if stuck else ""
        have = f"{_number(first)} of {self.world_size}{states} {'has' if len(first) == 1 else 'have'}"
        others = sorted(set(ranks) - set(first))
        nor = f", nor {'has' if len(others) == 1 else 'have'} {_number(others)}," if others else ""
        return f"{self._name} {have} not answered {method_name}{nor}"

    def _cause(self, rank: int, error: Exception, pending: dict[int, ray.ObjectRef], method_name: str) -> Exception:
        """Picks what to raise when a rank has failed: a rank's death before all else, since it makes others fail."""
        errors = {rank: error}
        if not isinstance(error, _DEATHS):
            errors |= _errors_soon(pending, _CAUSE_GRACE_S if self._on_one_node else _NODE_GRACE_S)
        name = self._name
        deaths = [rank for rank, error in errors.items() if isinstance(error, _DEATHS)]
        for other in errors.keys() - {rank}:
            last_line = str(errors[other]).strip().splitlines()[-1]
            logger.error("%s rank %d failed in %s as well: %s", name, other, method_name, last_line)
        if not deaths:
            return error
        death = errors[deaths[0]]
        said = f"{name} rank {deaths[0]} of {self.world_size} died in {method_name}"
        text, last = str(death), ""
        if isinstance(death, OutOfMemoryError) or "worker process has died" in text:
            last = f"\n{said}. {_OUT_OF_MEMORY_ADVICE}"
        elif (lost := self._lost_node(deaths[0])) is not None:
            last = (
                f"\n{said}: node {lost} is gone. The same command goes on from the newest checkpoint, with as many "
                "nodes or another --nnodes"
            )
        return RayActorError(getattr(death, "actor_id", None), f"{said}: {text}{last}")

    def shutdown(self) -> None:
        """Kills the processes, those of all roles, and frees their places in the pool."""
        for actor in self._actors:
            ray.kill(actor)
        # The list is shared with the pool and with the groups that `spawn` made.
        self._actors.clear()


def _number(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _errors_soon(pending: dict[int, ray.ObjectRef], grace: float) -> dict[int, Exception]:
    """The errors, by rank, of the calls that fail within so many seconds, or until a dead process is among them."""
    errors: dict[int, Exception] = {}
    rank_of = {handle: rank for rank, handle in pending.items()}
    deadline = time.monotonic() + grace
    waiting = list(rank_of)
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        for handle in ready:
            try:
                ray.get(handle)
            except Exception as error:
                errors[rank_of[handle]] = error
    return errors


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
