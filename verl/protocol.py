"""DataProto: the batch that travels between the trainer and its workers.

A DataProto is a table with one row per sample. Tensor columns live in a TensorDict, columns of Python objects (prompts,
uids, tool arguments) in object ndarrays, and facts about the whole batch in `meta_info`. This module holds the table,
the row and column operations that the trainer needs, and how it is pickled. How single values are compared, picked and
turned into bytes is in `verl.utils.columns`.

Left out: which worker gets which rows (verl.single_controller), balancing rows by length (verl.utils.seqlen_balancing),
and nested or sparse tensors: a column is a dense tensor of rank >= 1. Shapes below write B for the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

# Names of verl's that nothing here needs
from verl.compat.futures import DataProtoFuture
from verl.compat.table import (
    DataProtoConfig,
    DataProtoItem,
    TableMethods,
    all_gather_data_proto,
    fold_batch_dim,
    list_of_dict_to_dict_of_list,
    unfold_batch_dim,
)
from verl.utils.columns import (
    RowIndex,
    deserialize_single_tensor,
    deserialize_tensordict,
    equal,
    object_array,
    refuse_conflicts,
    row_indices,
    serialize_single_tensor,
    serialize_tensordict,
    union_numpy_dict,
    union_tensor_dict,
)

__all__ = [
    "DataProto",
    "DataProtoConfig",
    "DataProtoFuture",
    "DataProtoItem",
    "all_gather_data_proto",
    "collate_fn",
    "deserialize_single_tensor",
    "deserialize_tensordict",
    "fold_batch_dim",
    "list_of_dict_to_dict_of_list",
    "pad_dataproto_to_divisor",
    "serialize_single_tensor",
    "serialize_tensordict",
    "unfold_batch_dim",
    "union_numpy_dict",
    "union_tensor_dict",
    "unpad_dataproto",
]


@dataclass(eq=False)
class DataProto(TableMethods):
    """A batch of B rows: tensors (B, ...), object ndarrays (B, ...) and facts about the whole batch.

    Without columns B is 0. Methods return a new DataProto that shares the rows' objects and has its own meta_info dict;
    those documented "in place" change self. Pickling moves tensors to the CPU and takes a view's own rows only.
    """

    batch: TensorDict | None = None
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)
    auto_padding: bool = False

    def __post_init__(self) -> None:
        self.check_consistency()

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return len(next(iter(self.non_tensor_batch.values()), ()))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.batch is None else dict(self.batch.items())

    def check_consistency(self) -> None:
        """Convert non-tensors to object ndarrays; ValueError (key, expected, got) if first dimensions differ."""
        if self.batch is not None and self.batch.batch_dims < 1:
            raise ValueError("batch: expected a TensorDict with batch size [B, ...], got batch size []")
        for key, value in self._tensors().items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"batch {key!r}: expected a tensor, got {type(value).__name__}")
        self.non_tensor_batch = {key: object_array(key, value) for key, value in self.non_tensor_batch.items()}
        for key, value in self.non_tensor_batch.items():
            if len(value) != len(self):
                raise ValueError(f"non-tensor {key!r}: expected {len(self)} rows, got {len(value)}")

    # ------------------------------------------------------------ construction and pickling

    @classmethod
    def from_dict(
        cls,
        tensors: dict[str, torch.Tensor] | None = None,
        non_tensors: dict[str, Any] | None = None,
        meta_info: dict[str, Any] | None = None,
        num_batch_dims: int = 1,
        auto_padding: bool = False,
    ) -> DataProto:
        """Build from columns whose first `num_batch_dims` dimensions agree; ValueError names a column that does not."""
        if num_batch_dims < 1:
            raise ValueError(f"num_batch_dims: expected at least 1, got {num_batch_dims}")
        batch = None
        if tensors:
            expected = tuple(next(iter(tensors.values())).shape[:num_batch_dims])
            for key, tensor in tensors.items():
                got = tuple(tensor.shape[:num_batch_dims])
                if got != expected or len(got) < num_batch_dims:
                    raise ValueError(f"tensor {key!r}: expected {num_batch_dims} batch dims {expected}, got {got}")
            batch = TensorDict(tensors, batch_size=expected)
        return cls(batch, dict(non_tensors or {}), dict(meta_info or {}), auto_padding)

    @classmethod
    def from_single_dict(
        cls, data: dict[str, Any], meta_info: dict[str, Any] | None = None, auto_padding: bool = False
    ) -> DataProto:
        """Build from one dict: tensors go to `batch`, ndarrays and lists to `non_tensor_batch`, else TypeError."""
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        others = {key: value for key, value in data.items() if key not in tensors}
        return cls.from_dict(tensors, others, meta_info, auto_padding=auto_padding)

    def _derive(self, batch: TensorDict | None, non_tensor_batch: dict[str, np.ndarray]) -> DataProto:
        return type(self)(batch, non_tensor_batch, dict(self.meta_info), self.auto_padding)

    def __getstate__(self) -> dict[str, Any]:
        # Bytes, not tensors: pickling a view as a tensor would send its parent's whole storage.
        return self.__dict__ | {"batch": None if self.batch is None else serialize_tensordict(self.batch)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.batch = None if state["batch"] is None else deserialize_tensordict(state["batch"])

    # ------------------------------------------------------------ columns

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> DataProto:
        """Keep the named keys (None keeps all of that kind). KeyError for an unknown key."""
        result = self._derive(None if self.batch is None else self.batch.copy(), dict(self.non_tensor_batch))
        if batch_keys is not None:
            self._require_tensors(batch_keys)
            result.batch = None if self.batch is None else self.batch.select(*batch_keys)
        if non_tensor_batch_keys is not None:
            result.non_tensor_batch = {key: self.non_tensor_batch[key] for key in non_tensor_batch_keys}
        if meta_info_keys is not None:
            result.meta_info = {key: self.meta_info[key] for key in meta_info_keys}
        return copy.deepcopy(result) if deepcopy else result

    def union(self, other: DataProto) -> DataProto:
        """Add other's tensors, non-tensors and meta_info, in place; returns self.

        ValueError, with self unchanged, if a shared key's values differ (NaN equals NaN) or the row counts do.
        """
        if len(self) != len(other) and self._has_columns() and other._has_columns():
            raise ValueError(f"union: expected {len(self)} rows, got {len(other)}")
        non_tensor_batch = union_numpy_dict(dict(self.non_tensor_batch), other.non_tensor_batch)
        refuse_conflicts("meta_info", self.meta_info, other.meta_info)
        if self.batch is None:
            self.batch = None if other.batch is None else other.batch.copy()
        elif other.batch is not None:
            union_tensor_dict(self.batch, other.batch)
        self.non_tensor_batch = non_tensor_batch
        self.meta_info = other.meta_info | self.meta_info
        return self

    def _has_columns(self) -> bool:
        return self.batch is not None or bool(self.non_tensor_batch)

    def _require_tensors(self, keys: Sequence[str]) -> None:
        missing = [key for key in keys if key not in self._tensors()]
        if missing:
            raise KeyError(f"no tensor {missing} in batch")

    # ------------------------------------------------------------ rows

    def __getitem__(self, item: int | slice | RowIndex) -> DataProto | DataProtoItem:
        """An int gives a DataProtoItem, a slice a view, integers or a bool mask a copy of those rows."""
        if isinstance(item, slice):
            batch = None if self.batch is None else self.batch[item]
            return self._derive(batch, {key: value[item] for key, value in self.non_tensor_batch.items()})
        if not isinstance(item, int | np.integer):
            return self.select_idxs(item)
        row = int(self._row_numbers([item])[0])
        batch = None if self.batch is None else self.batch[row]
        return DataProtoItem(batch, {key: v[row] for key, v in self.non_tensor_batch.items()}, dict(self.meta_info))

    def select_idxs(self, idxs: RowIndex) -> DataProto:
        """A copy of the rows picked by integers (repeats allowed) or a bool mask (B,). Errors as in `row_indices`."""
        rows = self._row_numbers(idxs)
        batch = None if self.batch is None else self.batch[torch.from_numpy(rows)]
        return self._derive(batch, {key: value[rows] for key, value in self.non_tensor_batch.items()})

    def _row_numbers(self, index: RowIndex) -> np.ndarray:
        return row_indices(index, len(self))

    def chunk(self, chunks: int) -> list[DataProto]:
        """Exactly `chunks` views in order. ValueError if B is not divisible, unless padding is enabled.

        With padding enabled no row is invented here: the first B % chunks views are one row longer, and a caller that
        needs equal sizes pads first (`pad_dataproto_to_divisor`).
        """
        size, longer = divmod(len(self), chunks)
        if longer and not self.is_padding_enabled():
            raise ValueError(f"chunk: expected a row count divisible by {chunks}, got {len(self)}")
        bounds = [part * size + min(part, longer) for part in range(chunks + 1)]
        return [self[start:end] for start, end in pairwise(bounds)]

    def split(self, split_size: int) -> list[DataProto]:
        """Views of split_size rows each, in order; the last may be shorter."""
        if split_size < 1:
            raise ValueError(f"split: expected split_size >= 1, got {split_size}")
        return [self[start : start + split_size] for start in range(0, len(self), split_size)]

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """Join the parts' rows in order.

        meta_info: the parts' values must be equal, except that "metrics" becomes a list of the parts' dicts (lists of
        dicts are joined). ValueError if there is no part, or keys or meta_info values differ.
        """
        if not data:
            raise ValueError("concat: expected at least one DataProto, got none")
        expected = _column_names(data[0])
        for part in data:
            if _column_names(part) != expected:
                raise ValueError(f"concat: expected the keys {expected}, got {_column_names(part)}")
        batch = None if data[0].batch is None else torch.cat([part.batch for part in data], dim=0)
        arrays = {key: np.concatenate([p.non_tensor_batch[key] for p in data]) for key in data[0].non_tensor_batch}
        return type(data[0])(batch, arrays, _concat_meta_info(data), any(part.auto_padding for part in data))


def _column_names(data: DataProto) -> tuple[list[str] | None, list[str]]:
    return None if data.batch is None else sorted(data._tensors()), sorted(data.non_tensor_batch)


def _concat_meta_info(parts: Sequence[DataProto]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.meta_info.items():
            if key == "metrics":
                merged[key] = merged.get(key, []) + (value if isinstance(value, list) else [value])
            elif not equal(merged.setdefault(key, value), value):
                raise ValueError(f"concat: meta_info key {key!r} differs between parts: {merged[key]!r}, {value!r}")
    return merged


# ---------------------------------------------------------------- padding


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Append rows from the front, cycling when B < size_divisor, until size_divisor divides B.

    Returns (padded, pad_size); `unpad_dataproto(padded, pad_size)` undoes it. Data without rows stays without.
    """
    pad_size = -len(data) % size_divisor
    if pad_size == 0:
        return data, 0
    return data.select_idxs(np.arange(len(data) + pad_size) % len(data)), pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Drop the last pad_size rows (a view). ValueError unless 0 <= pad_size <= B."""
    if not 0 <= pad_size <= len(data):
        raise ValueError(f"pad_size: expected between 0 and {len(data)}, got {pad_size}")
    return data[: len(data) - pad_size] if pad_size else data


# ---------------------------------------------------------------- names of verl's that nothing here calls


def collate_fn(data_items: Sequence[DataProtoItem]) -> DataProto:
    """Stack rows into a batch, e.g. as a DataLoader's collate_fn over a DataProto; meta_info is the first row's."""
    batch = None if data_items[0].batch is None else torch.stack([item.batch for item in data_items])
    non_tensors = list_of_dict_to_dict_of_list([item.non_tensor_batch for item in data_items])
    return DataProto(batch, non_tensors, dict(data_items[0].meta_info))
