"""Dispatch modes of verl's that nothing here uses. They need what the modes in use are made of, so they are here."""

from typing import Any

from verl.single_controller.base.dispatch import Ranks, dispatch_dp_proto, map_values


def dispatch_all_to_all(group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """Every rank gets its element of each list; ValueError for a list of another length."""

    def share(value: Any) -> list:
        if not isinstance(value, list | tuple) or len(value) != group.world_size:
            got = f"{len(value)} elements" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
            raise ValueError(
                f"expected a list with {group.world_size} elements, one per rank, got {got}. "
                "To give every rank the same value, use Dispatch.ONE_TO_ALL."
            )
        return list(value)

    return map_values(share, args, kwargs)


def dispatch_dp_proto_with_func(group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """As `dispatch_dp_proto`, with a function as first argument; ValueError without one."""
    if not args or not callable(args[0]):
        raise ValueError(f"the first positional argument must be a function, got {args[:1] or 'none'}.")
    return dispatch_dp_proto(group, *args, **kwargs)
