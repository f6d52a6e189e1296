"""Dispatch modes of verl's that nothing here uses. They need what the modes in use are made of, so they are here."""

from typing import Any

from verl.single_controller.base.dispatch import DispatchFns, Ranks, chunk, concat, dispatch_dp_proto, map_values


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


def make_nd_compute_dataproto_dispatch_fn(mesh_name: str) -> DispatchFns:
    """Returns the functions of DP_COMPUTE_PROTO for ranks that form data-parallel groups of more than one rank.

    All ranks of a group get the same chunk and one of them answers; each rank says where it stands through
    `Worker.register_dispatch_collect_info(mesh_name, dp_rank, is_collect)`.
    """

    def chunk_count(group: Ranks) -> int:
        return max(dp_rank for dp_rank, _ in group.mesh_places(mesh_name)) + 1

    def dispatch(group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        chunks = chunk_count(group)

        def share(value: Any) -> list:
            parts = chunk(value, chunks)
            return [parts[dp_rank] for dp_rank, _ in group.mesh_places(mesh_name)]

        return map_values(share, args, kwargs)

    def collect(group: Ranks, outputs: list) -> Any:
        by_dp_rank = {
            dp_rank: output
            for (dp_rank, is_collect), output in zip(group.mesh_places(mesh_name), outputs, strict=True)
            if is_collect
        }
        return concat([by_dp_rank[dp_rank] for dp_rank in sorted(by_dp_rank)])

    return {"dispatch_fn": dispatch, "collect_fn": collect, "chunk_count": chunk_count}
