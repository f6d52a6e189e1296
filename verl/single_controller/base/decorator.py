"""How the arguments of one call on a worker group become the arguments of each rank, and how the answers come back.

A dispatch mode is a pair of functions:

    dispatch_fn(group, *args, **kwargs) -> (args, kwargs)   each value a list with one element per rank
    collect_fn(group, outputs) -> result                    outputs: one element per rank, in rank order

and, for modes that cut a batch into chunks, `chunk_count(group)`: how many. The caller pads the batch to a multiple of
it beforehand and takes the padding off the result, so the pair never sees an uneven batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypedDict

from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto

if TYPE_CHECKING:
    from verl.single_controller.base.worker_group import WorkerGroup

REGISTRATION = "_registration"


@dataclass(frozen=True)
class DispatchMode:
    """The name of a dispatch mode; `get_predefined_dispatch_fn` gives its functions."""

    name: str


class Dispatch:
    """The dispatch modes. `register_dispatch_mode` adds to them."""

    RANK_ZERO = DispatchMode("RANK_ZERO")
    """Only rank 0 is called; the result is its answer."""
    ONE_TO_ALL = DispatchMode("ONE_TO_ALL")
    """Every rank gets the same arguments; the result is the list of answers."""
    ALL_TO_ALL = DispatchMode("ALL_TO_ALL")
    """Every argument is a list with one element per rank; the result is the list of answers."""
    DP_COMPUTE = DispatchMode("DP_COMPUTE")
    """As ALL_TO_ALL: for per-rank shares that the caller has cut."""
    DP_COMPUTE_PROTO = DispatchMode("DP_COMPUTE_PROTO")
    """Every DataProto is chunked over the ranks, other arguments are copied; the answers are concatenated."""
    DP_COMPUTE_PROTO_WITH_FUNC = DispatchMode("DP_COMPUTE_PROTO_WITH_FUNC")
    """As DP_COMPUTE_PROTO, with a function as first argument, which every rank gets."""
    DP_COMPUTE_METRIC = DispatchMode("DP_COMPUTE_METRIC")
    """As DP_COMPUTE_PROTO, but the result is the list of answers. Never padded: metrics would count rows twice."""


class Execute(Enum):
    """Which ranks run the method. With RANK_ZERO the result is rank 0's answer, as it is."""

    ALL = "all"
    RANK_ZERO = "rank_zero"


class _Pair(TypedDict):
    dispatch_fn: Callable[..., tuple[tuple, dict]]
    collect_fn: Callable[["WorkerGroup", list], Any]


class DispatchFns(_Pair, total=False):
    """A dispatch mode's functions; see the head of this file."""

    chunk_count: Callable[["WorkerGroup"], int]


@dataclass(frozen=True)
class Registration:
    """What `register` knows about a method."""

    dispatch_mode: DispatchMode | DispatchFns
    execute_mode: Execute
    blocking: bool

    @property
    def fns(self) -> DispatchFns:
        if isinstance(self.dispatch_mode, DispatchMode):
            return get_predefined_dispatch_fn(self.dispatch_mode)
        return self.dispatch_mode


def register(
    dispatch_mode: DispatchMode | DispatchFns = Dispatch.ALL_TO_ALL,
    execute_mode: Execute = Execute.ALL,
    blocking: bool = True,
) -> Callable[[Callable], Callable]:
    """Marks a worker's method as one that the driver may call on the whole group.

    Args:
        dispatch_mode: a mode, or the functions themselves (see `make_nd_compute_dataproto_dispatch_fn`).
        execute_mode: which ranks run.
        blocking: if false, the call returns at once with a `PendingResult`, whose `get()` waits.

    Raises:
        TypeError: dispatch_mode is neither of the two (at the class definition).
        ValueError: the batch would be chunked but only rank 0 would run.
    """
    is_pair = isinstance(dispatch_mode, dict) and {"dispatch_fn", "collect_fn"} <= dispatch_mode.keys()
    if not isinstance(dispatch_mode, DispatchMode) and not is_pair:
        raise TypeError(
            "dispatch_mode: expected a member of Dispatch, or a dict with dispatch_fn and collect_fn, "
            f"got {dispatch_mode!r}"
        )
    if dispatch_mode == Dispatch.RANK_ZERO:
        execute_mode = Execute.RANK_ZERO
    registration = Registration(dispatch_mode, execute_mode, blocking)
    if execute_mode is Execute.RANK_ZERO and "chunk_count" in registration.fns:
        raise ValueError(f"{dispatch_mode} chunks the batch, but Execute.RANK_ZERO would run the first chunk only.")

    def mark(method: Callable) -> Callable:
        setattr(method, REGISTRATION, registration)
        return method

    return mark


def get_predefined_dispatch_fn(dispatch_mode: DispatchMode) -> DispatchFns:
    """Returns the functions of a mode. Raises ValueError for an unknown one."""
    if dispatch_mode not in _FNS:
        raise ValueError(f"unknown dispatch mode {dispatch_mode!r}; known: {sorted(mode.name for mode in _FNS)}")
    return _FNS[dispatch_mode]


def register_dispatch_mode(dispatch_mode_name: str, dispatch_fn: Callable, collect_fn: Callable) -> None:
    """Adds `Dispatch.<name>`. Raises ValueError if there is one (then use `update_dispatch_mode`)."""
    if hasattr(Dispatch, dispatch_mode_name):
        raise ValueError(f"Dispatch.{dispatch_mode_name} exists: choose another name, or use update_dispatch_mode.")
    mode = DispatchMode(dispatch_mode_name)
    setattr(Dispatch, dispatch_mode_name, mode)
    _FNS[mode] = {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}


def update_dispatch_mode(dispatch_mode: DispatchMode, dispatch_fn: Callable, collect_fn: Callable) -> None:
    """Replaces the functions of a mode, padding included. Raises ValueError for an unknown one."""
    get_predefined_dispatch_fn(dispatch_mode)
    _FNS[dispatch_mode] = {"dispatch_fn": dispatch_fn, "collect_fn": collect_fn}


def make_nd_compute_dataproto_dispatch_fn(mesh_name: str) -> DispatchFns:
    """Returns the functions of DP_COMPUTE_PROTO for ranks that form data-parallel groups of more than one rank.

    All ranks of a group get the same chunk and one of them answers; each rank says where it stands through
    `Worker.register_dispatch_collect_info(mesh_name, dp_rank, is_collect)`.
    """

    def chunk_count(group: "WorkerGroup") -> int:
        return max(dp_rank for dp_rank, _ in group.mesh_places(mesh_name)) + 1

    def dispatch(group: "WorkerGroup", *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        chunks = chunk_count(group)

        def share(value: Any) -> list:
            parts = _chunk(value, chunks)
            return [parts[dp_rank] for dp_rank, _ in group.mesh_places(mesh_name)]

        return _map_values(share, args, kwargs)

    def collect(group: "WorkerGroup", outputs: list) -> Any:
        by_dp_rank = {
            dp_rank: output
            for (dp_rank, is_collect), output in zip(group.mesh_places(mesh_name), outputs, strict=True)
            if is_collect
        }
        return _concat([by_dp_rank[dp_rank] for dp_rank in sorted(by_dp_rank)])

    return {"dispatch_fn": dispatch, "collect_fn": collect, "chunk_count": chunk_count}


# ---- the shares of each rank ----


def _map_values(function: Callable[[Any], list], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tuple(function(value) for value in args), {name: function(value) for name, value in kwargs.items()}


def _chunk(value: Any, chunks: int) -> list:
    if not isinstance(value, DataProto):
        return [value] * chunks
    if len(value) == 0 or len(value) % chunks:
        raise ValueError(
            f"a batch of {len(value)} rows cannot be cut into {chunks} equal chunks, one per data-parallel rank. "
            f"Pass a positive multiple of {chunks} rows."
        )
    return value.chunk(chunks)


def _concat(outputs: list) -> DataProto:
    wrong = {type(output).__name__ for output in outputs if not isinstance(output, DataProto)}
    if wrong:
        raise TypeError(
            f"a method that is dispatched by DataProto must return a DataProto on every rank; got {sorted(wrong)}. "
            "For other answers use Dispatch.DP_COMPUTE_METRIC, which returns the list."
        )
    return DataProto.concat(outputs)


def _dispatch_one_to_all(group: "WorkerGroup", *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return _map_values(lambda value: [value] * group.world_size, args, kwargs)


def _dispatch_all_to_all(group: "WorkerGroup", *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    def share(value: Any) -> list:
        if not isinstance(value, list | tuple) or len(value) != group.world_size:
            got = f"{len(value)} elements" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
            raise ValueError(
                f"expected a list with {group.world_size} elements, one per rank, got {got}. "
                "To give every rank the same value, use Dispatch.ONE_TO_ALL."
            )
        return list(value)

    return _map_values(share, args, kwargs)


def _dispatch_dp_proto(group: "WorkerGroup", *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    return _map_values(lambda value: _chunk(value, group.world_size), args, kwargs)


def _dispatch_dp_proto_with_func(group: "WorkerGroup", *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    if not args or not callable(args[0]):
        raise ValueError(f"the first positional argument must be a function, got {args[:1] or 'none'}.")
    return _dispatch_dp_proto(group, *args, **kwargs)


def _collect_list(group: "WorkerGroup", outputs: list) -> list:
    return outputs


def _collect_proto(group: "WorkerGroup", outputs: list) -> DataProto:
    return _concat(outputs)


def _world_size(group: "WorkerGroup") -> int:
    return group.world_size


_FNS: dict[DispatchMode, DispatchFns] = {
    Dispatch.RANK_ZERO: {"dispatch_fn": _dispatch_one_to_all, "collect_fn": _collect_list},
    Dispatch.ONE_TO_ALL: {"dispatch_fn": _dispatch_one_to_all, "collect_fn": _collect_list},
    Dispatch.ALL_TO_ALL: {"dispatch_fn": _dispatch_all_to_all, "collect_fn": _collect_list},
    Dispatch.DP_COMPUTE: {"dispatch_fn": _dispatch_all_to_all, "collect_fn": _collect_list},
    Dispatch.DP_COMPUTE_PROTO: {
        "dispatch_fn": _dispatch_dp_proto,
        "collect_fn": _collect_proto,
        "chunk_count": _world_size,
    },
    Dispatch.DP_COMPUTE_PROTO_WITH_FUNC: {
        "dispatch_fn": _dispatch_dp_proto_with_func,
        "collect_fn": _collect_proto,
        "chunk_count": _world_size,
    },
    Dispatch.DP_COMPUTE_METRIC: {"dispatch_fn": _dispatch_dp_proto, "collect_fn": _collect_list},
}


# ---- padding ----


@dataclass(frozen=True)
class Padding:
    """How many rows were added to the batches of one call, and how many there are with them."""

    added: int
    padded_rows: int

    def remove(self, result: DataProto) -> DataProto:
        """Takes the answers to the added rows off the end of the result.

        A method may answer each row with k rows (k sampled responses per prompt), if they lie together.

        Raises:
            ValueError: the result has not k >= 1 rows per row, so it mixes the added rows in (a mean, a gradient).
        """
        if self.added == 0:
            return result
        if len(result) == 0 or len(result) % self.padded_rows:
            rows = self.padded_rows - self.added
            raise ValueError(
                f"a batch of {rows} rows was padded with {self.added} copies to {self.padded_rows}, and the result has "
                f"{len(result)} rows, so the copies' part in it cannot be taken out. Pass a batch that divides evenly."
            )
        return unpad_dataproto(result, self.added * (len(result) // self.padded_rows))


def pad_arguments(args: tuple, kwargs: dict, divisor: int) -> tuple[tuple, dict, Padding]:
    """Pads every DataProto among the arguments to a multiple of `divisor` rows by repeating rows.

    Raises:
        ValueError: there is no DataProto, one has no rows, or their row counts differ.
    """
    batches = [value for value in (*args, *kwargs.values()) if isinstance(value, DataProto)]
    row_counts = {len(batch) for batch in batches}
    if len(row_counts) != 1 or 0 in row_counts:
        raise ValueError(
            "a call dispatched by DataProto needs at least one DataProto argument, all with the same number (one or "
            f"more) of rows; got {len(batches)} with {[len(batch) for batch in batches]} rows."
        )
    (rows,) = row_counts
    added = -rows % divisor

    def pad(value: Any) -> Any:
        return pad_dataproto_to_divisor(value, divisor)[0] if isinstance(value, DataProto) else value

    padded_args = tuple(pad(value) for value in args)
    return padded_args, {name: pad(value) for name, value in kwargs.items()}, Padding(added, rows + added)
