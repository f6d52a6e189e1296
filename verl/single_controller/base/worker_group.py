"""A group of ranks that the driver calls as one object. How a call travels is left to a subclass (see `ray`)."""

from collections.abc import Callable
from typing import Any

# Names of verl's that nothing here needs
from verl.compat.futures import PendingResult, resolved
from verl.compat.workers import WorkerGroupMethods
from verl.single_controller.base.decorator import REGISTRATION, Execute, Registration
from verl.single_controller.base.dispatch import Padding, pad_arguments


class ResourcePool:
    """How many processes run on each node.

    Args:
        process_on_nodes: processes per node, for example [8, 8].
        max_colocate_count: how many worker groups may use the pool at the same time.

    Raises:
        ValueError: there are no processes, or no group may use them.
    """

    def __init__(self, process_on_nodes: list[int], max_colocate_count: int = 1) -> None:
        if not process_on_nodes or min(process_on_nodes) < 1:
            raise ValueError(
                f"process_on_nodes: expected one or more processes on each node, got {process_on_nodes}. "
                "Set trainer.nnodes and trainer.n_gpus_per_node to 1 or more."
            )
        if max_colocate_count < 1:
            raise ValueError(f"max_colocate_count: expected 1 or more, got {max_colocate_count}.")
        self.process_on_nodes = list(process_on_nodes)
        self.max_colocate_count = max_colocate_count

    @property
    def world_size(self) -> int:
        return sum(self.process_on_nodes)


class ClassWithInitArgs:
    """A class and the arguments with which each rank will construct it."""

    def __init__(self, cls: type, *args: Any, **kwargs: Any) -> None:
        self.cls = cls
        self.args = args
        self.kwargs = kwargs

    def __call__(self) -> Any:
        return self.cls(*self.args, **self.kwargs)


class WorkerGroup(WorkerGroupMethods):
    """Ranks 0 to world_size - 1 of one role.

    A subclass says how to start a call on one rank (`submit`) and how to wait for several (`wait`).
    """

    # Whether the ranks are in the driver's own process.
    in_driver = False

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._places: dict[str, list[tuple[int, bool]]] = {}

    @property
    def world_size(self) -> int:
        return self._world_size

    def mesh_places(self, mesh_name: str) -> list[tuple[int, bool]]:
        """Returns (dp_rank, is_collect) of each rank, asked of the workers once.

        Raises:
            ValueError: the data-parallel ranks are not 0, 1, 2, ... with exactly one collecting rank each.
        """
        if mesh_name not in self._places:
            places = self.query_dispatch_info(mesh_name)
            collecting = sorted(dp_rank for dp_rank, is_collect in places if is_collect)
            if collecting != list(range(len({dp_rank for dp_rank, _ in places}))):
                raise ValueError(
                    f"mesh {mesh_name!r}: expected data-parallel ranks 0, 1, 2, ... with one collecting rank each, got "
                    f"(dp_rank, is_collect) by rank: {places}. Correct the register_dispatch_collect_info calls."
                )
            self._places[mesh_name] = places
        return self._places[mesh_name]

    def submit(self, rank: int, method_name: str, args: tuple, kwargs: dict) -> Any:
        """Starts a call on one rank and returns a handle for it."""
        raise NotImplementedError

    def wait(self, handles: list, method_name: str) -> list:
        """Returns the results of one call, given its handles from rank 0 on; raises as soon as one of them fails."""
        raise NotImplementedError

    def goes_on(self, handles: list, method_name: str) -> None:
        """Told of a call that the driver does not wait for now; its errors come with `wait`, or before."""

    def _bind_worker_methods(self, worker_cls: type) -> None:
        """Gives this group a method for each registered method of the worker class."""
        for name in dir(worker_cls):
            registration = getattr(getattr(worker_cls, name), REGISTRATION, None)
            if registration is None:
                continue
            if hasattr(self, name):
                raise ValueError(
                    f"{worker_cls.__name__}.{name} is registered, but a worker group has its own {name}: rename it."
                )
            setattr(self, name, self._make_method(name, registration))

    def _make_method(self, name: str, registration: Registration) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            handles, finish = self._start(name, registration, args, kwargs)
            pending = PendingResult(lambda: finish(self.wait(handles, name)))
            if registration.blocking:
                return pending.get()
            self.goes_on(handles, name)
            return pending

        call.__name__ = name
        return call

    def _start(self, name: str, registration: Registration, args: tuple, kwargs: dict) -> tuple[list, Callable]:
        """Starts the call on the ranks; returns the handles and the function that makes one result of the answers."""
        args = tuple(resolved(value) for value in args)
        kwargs = {key: resolved(value) for key, value in kwargs.items()}
        fns = registration.fns
        padding = Padding(added=0, padded_rows=0)
        try:
            if "chunk_count" in fns:
                args, kwargs, padding = pad_arguments(args, kwargs, fns["chunk_count"](self))
            rank_args, rank_kwargs = fns["dispatch_fn"](self, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"cannot dispatch {name}: {error}") from error

        rank_zero_only = registration.execute_mode is Execute.RANK_ZERO
        handles = [
            self.submit(
                rank,
                name,
                tuple(shares[rank] for shares in rank_args),
                {key: shares[rank] for key, shares in rank_kwargs.items()},
            )
            for rank in range(1 if rank_zero_only else self.world_size)
        ]

        def finish(outputs: list) -> Any:
            return outputs[0] if rank_zero_only else padding.remove(fns["collect_fn"](self, outputs))

        return handles, finish
