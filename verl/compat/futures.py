"""Results that are still being computed, and handing them on without waiting for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl.compat.table import TableMethods


class PendingResult:
    """The result of a non-blocking call."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait

    def get(self) -> Any:
        """Waits for all ranks and returns what the blocking call would have. Raises what the first failing rank did."""
        return self._wait()


def _concat(parts: list[TableMethods]) -> TableMethods:
    if not parts:
        raise ValueError("concat: expected at least one DataProto, got none")
    return parts[0].concat(parts)


def _take_chunk(
    data: TableMethods, index: int, chunks: int, inner: Callable[[TableMethods], TableMethods] | None
) -> TableMethods:
    return (data if inner is None else inner(data)).chunk(chunks)[index]


@dataclass(eq=False)
class DataProtoFuture:
    """Results still being computed by Ray workers, so that the driver can pass them on without waiting for them.

    `get` fetches the object refs, joins the results with `collect_fn`, then applies `dispatch_fn` if there is one.
    """

    collect_fn: Callable[[list[Any]], TableMethods]
    futures: list[Any]
    dispatch_fn: Callable[[TableMethods], TableMethods] | None = None

    @staticmethod
    def concat(data: list[Any]) -> DataProtoFuture:
        """The future of the concatenation of the DataProtos behind the object refs `data`."""
        return DataProtoFuture(collect_fn=_concat, futures=data)

    def chunk(self, chunks: int) -> list[DataProtoFuture]:
        """One future per chunk of the result. Each fetches everything and keeps its chunk, where `get` is called."""
        picks = [partial(_take_chunk, index=i, chunks=chunks, inner=self.dispatch_fn) for i in range(chunks)]
        return [DataProtoFuture(self.collect_fn, self.futures, pick) for pick in picks]

    def get(self) -> TableMethods:
        """Wait for the workers; an error raised in one propagates."""
        import ray  # here, so that single-process use needs no Ray

        result = self.collect_fn(ray.get(self.futures))
        return result if self.dispatch_fn is None else self.dispatch_fn(result)


def resolved(value: Any) -> Any:
    """What a pending result or a future stands for, once it is there; any other value as it is."""
    return value.get() if isinstance(value, PendingResult | DataProtoFuture) else value
