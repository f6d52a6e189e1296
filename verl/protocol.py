"""DataProto: the batch that travels between the trainer and its workers.

A DataProto is a table with one row per sample. Tensor columns live in a TensorDict, columns of Python objects (prompts,
uids, tool arguments) in object ndarrays, and facts about the whole batch in `meta_info`. This module holds the table,
its row and column operations, how it is pickled and saved, and the future that stands for a table still being computed
by Ray workers. How single values are compared, picked and turned into bytes is in `verl.utils.columns`.

Left out: which worker gets which rows (verl.single_controller), balancing rows by length (verl.utils.seqlen_balancing),
and nested or sparse tensors: a column is a dense tensor of rank >= 1. Shapes below write B for the rows.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.utils.data import DataLoader

from verl.utils.columns import (
    RowIndex,
    deserialize_single_tensor,
    deserialize_tensordict,
    equal,
    from_plain,
    list_of_dict_to_dict_of_list,
    object_array,
    refuse_conflicts,
    row_indices,
    serialize_single_tensor,
    serialize_tensordict,
    to_plain,
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


# ---------------------------------------------------------------- the table


class _AutoPaddingSwitch(type):
    _assigned: bool | None = None

    @property
    def auto_padding(cls) -> bool:
        """Whether `chunk` accepts uneven sizes everywhere; unless assigned, the environment decides."""
        if cls._assigned is not None:
            return cls._assigned
        return os.environ.get("VERL_AUTO_PADDING", "").lower() in ("1", "true")

    @auto_padding.setter
    def auto_padding(cls, value: bool | None) -> None:
        cls._assigned = value


class DataProtoConfig(metaclass=_AutoPaddingSwitch):
    """Process-wide switch: assign `DataProtoConfig.auto_padding`, or set VERL_AUTO_PADDING=1 (None: back to that)."""


@dataclass(eq=False)
class DataProtoItem:
    """One row: tensors without their batch dimension, one object per non-tensor key, the batch's meta_info."""

    batch: TensorDict | None = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DataProto:
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

    # ------------------------------------------------------------ construction and conversion

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

    @classmethod
    def from_tensordict(cls, tensor_dict: TensorDict, meta_info: dict[str, Any] | None = None) -> DataProto:
        """Undo `to_tensordict`: NonTensorStack entries become non-tensors, NonTensorData entries meta_info."""
        values = dict(tensor_dict.items())
        stacks = {key: value.tolist() for key, value in values.items() if isinstance(value, NonTensorStack)}
        facts = {key: value.data for key, value in values.items() if isinstance(value, NonTensorData)}
        batch = tensor_dict.exclude(*stacks, *facts)
        return cls(None if batch.is_empty() else batch, stacks, facts | (meta_info or {}))

    def to_tensordict(self) -> TensorDict:
        """One TensorDict of everything: rows of objects as NonTensorStack, meta_info as NonTensorData.

        ValueError if two of the three kinds share a key.
        """
        keys = [*self._tensors(), *self.non_tensor_batch, *self.meta_info]
        if len(set(keys)) < len(keys):
            raise ValueError(f"to_tensordict: expected distinct keys, got {sorted(keys)}")
        result = TensorDict({}, batch_size=[len(self)]) if self.batch is None else self.batch.copy()
        for key, values in self.non_tensor_batch.items():
            rows = [NonTensorData(value) for value in values]
            result.set(key, NonTensorStack(*rows) if rows else NonTensorStack(batch_size=[0]))
        for key, value in self.meta_info.items():
            result.set_non_tensor(key, value)
        return result

    def _derive(self, batch: TensorDict | None, non_tensor_batch: dict[str, np.ndarray]) -> DataProto:
        return type(self)(batch, non_tensor_batch, dict(self.meta_info), self.auto_padding)

    def __getstate__(self) -> dict[str, Any]:
        # Bytes, not tensors: pickling a view as a tensor would send its parent's whole storage.
        return self.__dict__ | {"batch": None if self.batch is None else serialize_tensordict(self.batch)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.batch = None if state["batch"] is None else deserialize_tensordict(state["batch"])

    def __deepcopy__(self, memo: dict[int, Any]) -> DataProto:
        # The default goes through __getstate__ and would move tensors to the CPU.
        batch = None if self.batch is None else self.batch.clone()
        non_tensor_batch, meta_info = copy.deepcopy((self.non_tensor_batch, self.meta_info), memo)
        return type(self)(batch, non_tensor_batch, meta_info, self.auto_padding)

    def save_to_disk(self, filepath: str | os.PathLike) -> None:
        """Write a file that loads without running pickled code. TypeError names a value that is not plain data."""
        plain = {
            "batch_size": None if self.batch is None else list(self.batch.batch_size),
            "tensors": to_plain("batch", self._tensors()),
            "non_tensors": to_plain("non_tensor_batch", self.non_tensor_batch),
            "meta_info": to_plain("meta_info", self.meta_info),
            "auto_padding": self.auto_padding,
        }
        torch.save(plain, filepath)

    @classmethod
    def load_from_disk(cls, filepath: str | os.PathLike) -> DataProto:
        """Read what `save_to_disk` wrote, on the CPU; numpy scalars come back as Python numbers."""
        plain = torch.load(filepath, weights_only=True)
        size = plain["batch_size"]
        batch = None if size is None else TensorDict(plain["tensors"], batch_size=size)
        return cls(batch, from_plain(plain["non_tensors"]), from_plain(plain["meta_info"]), plain["auto_padding"])

    def to(self, device: torch.device | str) -> DataProto:
        """Move the tensors, in place; returns self."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    def get_data_info(self) -> str:
        """One line per key: `batch/input_ids: torch.int64 (8, 512) cpu`."""
        lines = [f"batch/{key}: {v.dtype} {tuple(v.shape)} {v.device}" for key, v in self._tensors().items()]
        for key, value in self.non_tensor_batch.items():
            first = type(value.flat[0]).__name__ if value.size else "no rows"
            lines.append(f"non_tensor_batch/{key}: {value.shape} of {first}")
        lines += [f"meta_info/{key}: {type(value).__name__}" for key, value in self.meta_info.items()]
        return "\n".join(lines)

    def print_size(self, prefix: str = "") -> None:
        """Print the size of the tensors and of the (pickled) non-tensors in MiB."""
        tensors = sum(value.nbytes for value in self._tensors().values())
        objects = len(pickle.dumps(self.non_tensor_batch))
        sizes = f"tensors {tensors / 2**20:.3f} MiB, objects {objects / 2**20:.3f} MiB"
        print(f"{prefix} {len(self)} rows: {sizes}".strip())

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
            _require_tensors(self, batch_keys)
            result.batch = None if self.batch is None else self.batch.select(*batch_keys)
        if non_tensor_batch_keys is not None:
            result.non_tensor_batch = {key: self.non_tensor_batch[key] for key in non_tensor_batch_keys}
        if meta_info_keys is not None:
            result.meta_info = {key: self.meta_info[key] for key in meta_info_keys}
        return copy.deepcopy(result) if deepcopy else result

    def pop(
        self,
        batch_keys: Sequence[str] = (),
        non_tensor_batch_keys: Sequence[str] = (),
        meta_info_keys: Sequence[str] = (),
    ) -> DataProto:
        """Move the named keys out of self, in place, into the result. KeyError, with self unchanged, if one is unknown.

        Without batch_keys the result's `batch` is None, so it has rows only if it has non-tensors.
        """
        result = self.select(batch_keys or (), non_tensor_batch_keys or (), meta_info_keys or ())
        if batch_keys:
            self.batch = self.batch.exclude(*batch_keys)
        else:
            result.batch = None
        for key in non_tensor_batch_keys or ():
            del self.non_tensor_batch[key]
        for key in meta_info_keys or ():
            del self.meta_info[key]
        return result

    def rename(self, old_keys: str | Sequence[str], new_keys: str | Sequence[str]) -> DataProto:
        """Rename tensor keys, in place, all at once (so two may swap); returns self.

        KeyError for an unknown key; ValueError if the lists differ in length or a new name is taken.
        """
        old_keys = [old_keys] if isinstance(old_keys, str) else list(old_keys)
        new_keys = [new_keys] if isinstance(new_keys, str) else list(new_keys)
        if len(old_keys) != len(new_keys):
            raise ValueError(f"rename: expected {len(old_keys)} new keys, got {len(new_keys)}")
        renamed = dict(zip(old_keys, new_keys, strict=True))
        _require_tensors(self, old_keys)
        names = [renamed.get(key, key) for key in self._tensors()]
        if len(set(names)) < len(names):
            raise ValueError(f"rename: expected distinct keys, got {names}")
        if renamed:
            tensors = dict(zip(names, self._tensors().values(), strict=True))
            self.batch = TensorDict(tensors, batch_size=self.batch.batch_size, device=self.batch.device)
        return self

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

    # ------------------------------------------------------------ rows

    def __getitem__(self, item: int | slice | RowIndex) -> DataProto | DataProtoItem:
        """An int gives a DataProtoItem, a slice a view, integers or a bool mask a copy of those rows."""
        if isinstance(item, slice):
            batch = None if self.batch is None else self.batch[item]
            return self._derive(batch, {key: value[item] for key, value in self.non_tensor_batch.items()})
        if not isinstance(item, int | np.integer):
            return self.select_idxs(item)
        row = int(row_indices([item], len(self))[0])
        batch = None if self.batch is None else self.batch[row]
        return DataProtoItem(batch, {key: v[row] for key, v in self.non_tensor_batch.items()}, dict(self.meta_info))

    def slice(self, start: int | None = None, end: int | None = None, step: int | None = None) -> DataProto:
        """Rows start:end:step as a view: writing to its tensors writes to self's."""
        return self[slice(start, end, step)]

    def select_idxs(self, idxs: RowIndex) -> DataProto:
        """A copy of the rows picked by integers (repeats allowed) or a bool mask (B,). Errors as in `row_indices`."""
        rows = row_indices(idxs, len(self))
        batch = None if self.batch is None else self.batch[torch.from_numpy(rows)]
        return self._derive(batch, {key: value[rows] for key, value in self.non_tensor_batch.items()})

    def reorder(self, indices: RowIndex) -> None:
        """Permute the rows in place: new row i is old row indices[i]. ValueError unless a permutation of 0..B-1."""
        rows = row_indices(indices, len(self))
        if not np.array_equal(np.sort(rows), np.arange(len(self))):
            raise ValueError(f"reorder: expected a permutation of {len(self)} rows, got {len(rows)} indices")
        moved = self.select_idxs(rows)
        self.batch, self.non_tensor_batch = moved.batch, moved.non_tensor_batch

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> DataProto:
        """Repeat every row: interleaved a a b b (copies of a prompt adjacent), otherwise a b a b."""
        rows = np.arange(len(self))
        return self.select_idxs(np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times))

    def sample_level_repeat(self, repeat_times: Sequence[int] | np.ndarray | torch.Tensor) -> DataProto:
        """Repeat row i repeat_times[i] times, copies adjacent. ValueError unless there is one count per row."""
        counts = np.asarray(repeat_times, dtype=np.int64)
        if counts.shape != (len(self),):
            raise ValueError(f"sample_level_repeat: expected {len(self)} counts, got shape {counts.shape}")
        return self.select_idxs(np.repeat(np.arange(len(self)), counts))

    def unfold_column_chunks(self, n_split: int, split_keys: Sequence[str] | None = None) -> DataProto:
        """Cut columns into n_split chunks along dim 1, (B, n_split * m, ...) -> (B * n_split, m, ...).

        Row b * n_split + j holds chunk j of row b; keys not split repeat row b. split_keys None splits every tensor of
        rank >= 2. KeyError for a key that is no tensor here, ValueError for a dim 1 that n_split does not divide.
        """
        if split_keys is None:
            split_keys = [key for key, value in self._tensors().items() if value.ndim >= 2]
        _require_tensors(self, split_keys)
        result = self.repeat(n_split, interleave=True)
        for key in split_keys:
            column = self.batch[key]
            if column.ndim < 2 or column.shape[1] % n_split:
                raise ValueError(f"{key!r}: expected dim 1 divisible by {n_split}, got shape {tuple(column.shape)}")
            result.batch[key] = column.reshape(len(result), column.shape[1] // n_split, *column.shape[2:])
        return result

    def is_padding_enabled(self) -> bool:
        """Whether this batch, or DataProtoConfig for all, lets `chunk` take a size that does not divide evenly."""
        return self.auto_padding or DataProtoConfig.auto_padding

    def padding(self, padding_size: int, padding_candidate: str = "first") -> None:
        """Append padding_size copies of the "first" or "last" row, in place. ValueError if there is no row to copy."""
        if padding_candidate not in ("first", "last"):
            raise ValueError(f"padding_candidate: expected 'first' or 'last', got {padding_candidate!r}")
        if padding_size and len(self) == 0:
            raise ValueError("padding: expected at least one row to copy, got none")
        source = 0 if padding_candidate == "first" else len(self) - 1
        padded = self.select_idxs(np.append(np.arange(len(self)), np.full(padding_size, source, dtype=np.int64)))
        self.batch, self.non_tensor_batch = padded.batch, padded.non_tensor_batch

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

    def make_iterator(
        self,
        mini_batch_size: int,
        epochs: int,
        seed: int | None = None,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[DataProto]:
        """Iterate over mini-batches `epochs` times; with dataloader_kwargs {"shuffle": True} the seed fixes the order.

        ValueError, before the first mini-batch, if mini_batch_size does not divide B.
        """
        if len(self) % mini_batch_size:
            raise ValueError(f"make_iterator: expected mini_batch_size to divide {len(self)}, got {mini_batch_size}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader = DataLoader(
            range(len(self)),
            mini_batch_size,
            collate_fn=self.select_idxs,
            generator=generator,
            **dataloader_kwargs or {},
        )
        return (mini_batch for _ in range(epochs) for mini_batch in loader)


def _require_tensors(data: DataProto, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in data._tensors()]
    if missing:
        raise KeyError(f"no tensor {missing} in batch")


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


# ---------------------------------------------------------------- functions of tables


def collate_fn(data_items: Sequence[DataProtoItem]) -> DataProto:
    """Stack rows into a batch, e.g. as a DataLoader's collate_fn over a DataProto; meta_info is the first row's."""
    batch = None if data_items[0].batch is None else torch.stack([item.batch for item in data_items])
    non_tensors = list_of_dict_to_dict_of_list([item.non_tensor_batch for item in data_items])
    return DataProto(batch, non_tensors, dict(data_items[0].meta_info))


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


def fold_batch_dim(data: DataProto, new_batch_size: int) -> DataProto:
    """Group adjacent rows, (B, ...) -> (new_batch_size, B // new_batch_size, ...). ValueError if not divisible."""
    if len(data) % new_batch_size:
        raise ValueError(f"fold_batch_dim: expected {new_batch_size} to divide the row count, got {len(data)}")
    shape = (new_batch_size, len(data) // new_batch_size)
    return _reshape_rows(data, shape, batch_dims=1)


def unfold_batch_dim(data: DataProto, batch_dims: int = 2) -> DataProto:
    """Undo `fold_batch_dim`: merge the first batch_dims dimensions of every column, (B, N, ...) -> (B * N, ...)."""
    columns = [*data._tensors().values(), *data.non_tensor_batch.values()]
    rows = int(np.prod(columns[0].shape[:batch_dims])) if columns else 0
    return _reshape_rows(data, (rows,), batch_dims)


def _reshape_rows(data: DataProto, shape: tuple[int, ...], batch_dims: int) -> DataProto:
    def reshape(value: Any) -> Any:
        return value.reshape(*shape, *value.shape[batch_dims:])

    tensors = {key: reshape(value) for key, value in data._tensors().items()}
    batch = None if data.batch is None else TensorDict(tensors, batch_size=shape[:1], device=data.batch.device)
    return data._derive(batch, {key: reshape(value) for key, value in data.non_tensor_batch.items()})


def all_gather_data_proto(data: DataProto, process_group: torch.distributed.ProcessGroup | None) -> None:
    """Replace data's rows, in place, by those of all ranks in rank order; each rank keeps its device and meta_info."""
    parts: list[Any] = [None] * torch.distributed.get_world_size(process_group)
    own_rows = data.select(meta_info_keys=())
    torch.distributed.all_gather_object(parts, own_rows, group=process_group)
    gathered = DataProto.concat(parts)
    devices = {tensor.device for tensor in data._tensors().values()}
    if devices:
        gathered.to(devices.pop())  # pickling brought them to the CPU
    data.batch, data.non_tensor_batch = gathered.batch, gathered.non_tensor_batch


# ---------------------------------------------------------------- futures


def _take_chunk(data: DataProto, index: int, chunks: int, inner: Callable[[DataProto], DataProto] | None) -> DataProto:
    return (data if inner is None else inner(data)).chunk(chunks)[index]


@dataclass(eq=False)
class DataProtoFuture:
    """Results still being computed by Ray workers, so that the driver can pass them on without waiting for them.

    `get` fetches the object refs, joins the results with `collect_fn`, then applies `dispatch_fn` if there is one.
    """

    collect_fn: Callable[[list[Any]], DataProto]
    futures: list[Any]
    dispatch_fn: Callable[[DataProto], DataProto] | None = None

    @staticmethod
    def concat(data: list[Any]) -> DataProtoFuture:
        """The future of the concatenation of the DataProtos behind the object refs `data`."""
        return DataProtoFuture(collect_fn=DataProto.concat, futures=data)

    def chunk(self, chunks: int) -> list[DataProtoFuture]:
        """One future per chunk of the result. Each fetches everything and keeps its chunk, where `get` is called."""
        picks = [partial(_take_chunk, index=i, chunks=chunks, inner=self.dispatch_fn) for i in range(chunks)]
        return [DataProtoFuture(self.collect_fn, self.futures, pick) for pick in picks]

    def get(self) -> DataProto:
        """Wait for the workers; an error raised in one propagates."""
        import ray  # here, so that single-process use needs no Ray

        result = self.collect_fn(ray.get(self.futures))
        return result if self.dispatch_fn is None else self.dispatch_fn(result)
