"""Worker groups on Ray: one process per rank, each with its own CPU and GPU, one or several roles in each process."""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from verl.single_controller.base import ClassWithInitArgs, Worker, WorkerGroup
from verl.single_controller.ray.nodes import Node, all_nodes
from verl.single_controller.ray.pools import RayResourcePool
from verl.utils.stalls import waiting

logger = logging.getLogger(__name__)

# When a rank dies, its neighbours' collectives fail too, and their error may arrive first.
_CAUSE_GRACE_S = 2.0
# When a node is lost, its neighbours notice at once, and Ray after five of its looks, three seconds apart.
_NODE_GRACE_S = 30.0
# What ends a process from outside. The second one is Ray's own, before the kernel does it.
_DEATHS = (RayActorError, OutOfMemoryError)
_OUT_OF_MEMORY_ADVICE = (
    "Where a process ends without a word of its own, the machine's memory was full most often (`dmesg` says so): use "
    "fewer ranks on a machine (trainer.n_gpus_per_node), shorter or smaller batches, or let less rest in its memory "
    "(fsdp_config: param_offload, optimizer_offload)"
)


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
