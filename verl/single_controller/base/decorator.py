"""Which of a worker's methods the driver may call on the whole group, and how a call is dispatched to the ranks.

What a dispatch mode is made of is in `dispatch`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from verl.single_controller.base.dispatch import (
    DispatchFns,
    chunk_per_rank,
    collect_list,
    collect_proto,
    dispatch_dp_proto,
    dispatch_one_to_all,
    make_nd_compute_dataproto_dispatch_fn,
    metrics_of_groups,
)

# Names of verl's that nothing here needs
from verl.single_controller.base.verl_modes import (
    dispatch_all_to_all,
    dispatch_dp_proto_with_func,
)

__all__ = [
    "Dispatch",
    "Execute",
    "get_predefined_dispatch_fn",
    "make_nd_compute_dataproto_dispatch_fn",
    "metrics_of_groups",
    "register",
    "register_dispatch_mode",
    "update_dispatch_mode",
]

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


_FNS: dict[DispatchMode, DispatchFns] = {
    Dispatch.RANK_ZERO: {"dispatch_fn": dispatch_one_to_all, "collect_fn": collect_list},
    Dispatch.ONE_TO_ALL: {"dispatch_fn": dispatch_one_to_all, "collect_fn": collect_list},
    Dispatch.ALL_TO_ALL: {"dispatch_fn": dispatch_all_to_all, "collect_fn": collect_list},
    Dispatch.DP_COMPUTE: {"dispatch_fn": dispatch_all_to_all, "collect_fn": collect_list},
    Dispatch.DP_COMPUTE_PROTO: {
        "dispatch_fn": dispatch_dp_proto,
        "collect_fn": collect_proto,
        "chunk_count": chunk_per_rank,
    },
    Dispatch.DP_COMPUTE_PROTO_WITH_FUNC: {
        "dispatch_fn": dispatch_dp_proto_with_func,
        "collect_fn": collect_proto,
        "chunk_count": chunk_per_rank,
    },
    Dispatch.DP_COMPUTE_METRIC: {"dispatch_fn": dispatch_dp_proto, "collect_fn": collect_list},
}


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


# ---- names of verl's that nothing here calls ----


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
