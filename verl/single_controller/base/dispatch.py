"""What each rank gets of the arguments of one call on a worker group, and how the answers come back.

A dispatch mode is a pair of functions:

    dispatch_fn(group, *args, **kwargs) -> (args, kwargs)   each value a list with one element per rank
    collect_fn(group, outputs) -> result                    outputs: one element per rank, in rank order

and, for modes that cut a batch into chunks, `chunk_count(group)`: how many. The caller pads the batch to a multiple of
it beforehand and takes the padding off the result, so the pair never sees an uneven batch.

Tables, which take torch, are loaded with the first call: processes are started without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

if TYPE_CHECKING:
    from verl.protocol import DataProto


class Ranks(Protocol):
    """What a dispatch mode asks of a worker group."""

    @property
    def world_size(self) -> int: ...

    def mesh_places(self, mesh_name: str) -> list[tuple[int, bool]]:
        """(dp_rank, is_collect) of each rank; asked by modes of a mesh alone."""


class _Pair(TypedDict):
    dispatch_fn: Callable[..., tuple[tuple, dict]]
    collect_fn: Callable[[Ranks, list], Any]


class DispatchFns(_Pair, total=False):
    """A dispatch mode's functions; see the head of this file."""

    chunk_count: Callable[[Ranks], int]


# ---- the shares of each rank ----


def map_values(function: Callable[[Any], list], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The function's list for each argument."""
    return tuple(function(value) for value in args), {name: function(value) for name, value in kwargs.items()}


def chunk(value: Any, chunks: int) -> list:
    """A DataProto in `chunks` equal parts, anything else `chunks` times; ValueError if the rows do not divide."""
    from verl.protocol import DataProto

    if not isinstance(value, DataProto):
        return [value] * chunks
    if len(value) == 0 or len(value) % chunks:
        raise ValueError(
            f"a batch of {len(value)} rows cannot be cut into {chunks} equal chunks, one per data-parallel rank. "
            f"Pass a positive multiple of {chunks} rows."
        )
    return value.chunk(chunks)


def concat(outputs: list) -> DataProto:
    """The ranks' DataProtos as one, in their order; TypeError for anything else."""
    from verl.protocol import DataProto

    wrong = {type(output).__name__ for output in outputs if not isinstance(output, DataProto)}
    if wrong:
        raise TypeError(
            f"a method that is dispatched by DataProto must return a DataProto on every rank; got {sorted(wrong)}. "
            "For other answers use Dispatch.DP_COMPUTE_METRIC, which returns the list."
        )
    return DataProto.concat(outputs)


def dispatch_one_to_all(group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """Every rank gets the same."""
    return map_values(lambda value: [value] * group.world_size, args, kwargs)


def dispatch_dp_proto(group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """Every rank gets its chunk of each DataProto and all of anything else."""
    return map_values(lambda value: chunk(value, group.world_size), args, kwargs)


def collect_list(group: Ranks, outputs: list) -> list:
    """The list of answers."""
    return outputs


def collect_proto(group: Ranks, outputs: list) -> DataProto:
    """The answers as one DataProto."""
    return concat(outputs)


def chunk_per_rank(group: Ranks) -> int:
    """As many chunks as ranks."""
    return group.world_size


# ---- ranks that form groups ----


def make_nd_compute_dataproto_dispatch_fn(mesh_name: str) -> DispatchFns:
    """Returns the functions of DP_COMPUTE_PROTO for ranks that form data-parallel groups of more than one rank.

    All ranks of a group get the same chunk and one of them answers; each rank says where it stands through
    `Worker.register_dispatch_collect_info(mesh_name, dp_rank, is_collect)`.
    """

    def collect(group: Ranks, outputs: list) -> DataProto:
        return concat(_answers_of_groups(mesh_name, group, outputs))

    return {
        "dispatch_fn": partial(_dispatch_to_groups, mesh_name),
        "collect_fn": collect,
        "chunk_count": partial(_group_count, mesh_name),
    }


def metrics_of_groups(mesh_name: str) -> DispatchFns:
    """Returns the functions of DP_COMPUTE_METRIC for such ranks: the result is the list of one answer of each group."""
    return {
        "dispatch_fn": partial(_dispatch_to_groups, mesh_name),
        "collect_fn": partial(_answers_of_groups, mesh_name),
    }


def _group_count(mesh_name: str, group: Ranks) -> int:
    return max(dp_rank for dp_rank, _ in group.mesh_places(mesh_name)) + 1


def _dispatch_to_groups(mesh_name: str, group: Ranks, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """Every rank gets its group's chunk of each DataProto and all of anything else."""
    chunks = _group_count(mesh_name, group)

    def share(value: Any) -> list:
        parts = chunk(value, chunks)
        return [parts[dp_rank] for dp_rank, _ in group.mesh_places(mesh_name)]

    return map_values(share, args, kwargs)


def _answers_of_groups(mesh_name: str, group: Ranks, outputs: list) -> list:
    places = zip(group.mesh_places(mesh_name), outputs, strict=True)
    by_dp_rank = {dp_rank: output for (dp_rank, is_collect), output in places if is_collect}
    return [by_dp_rank[dp_rank] for dp_rank in sorted(by_dp_rank)]


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
        from verl.protocol import unpad_dataproto

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
    from verl.protocol import DataProto, pad_dataproto_to_divisor

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
