"""A table's further columns, rows, shapes and forms: verl's methods of DataProto, and its functions of one.

`TableMethods` is a part of `verl.protocol.DataProto` and calls the rest of it. B is the number of rows.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.utils.data import DataLoader

from verl.compat.plain import from_plain, to_plain

if TYPE_CHECKING:
    from typing_extensions import Self


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


class TableMethods:
    """Methods of a DataProto, built on its fields and on those of its methods that the trainer needs."""

    batch: TensorDict | None
    non_tensor_batch: dict[str, np.ndarray]
    meta_info: dict[str, Any]
    auto_padding: bool

    @classmethod
    def from_tensordict(cls, tensor_dict: TensorDict, meta_info: dict[str, Any] | None = None) -> Self:
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
    def load_from_disk(cls, filepath: str | os.PathLike) -> Self:
        """Read what `save_to_disk` wrote, on the CPU; numpy scalars come back as Python numbers."""
        plain = torch.load(filepath, weights_only=True)
        size = plain["batch_size"]
        batch = None if size is None else TensorDict(plain["tensors"], batch_size=size)
        return cls(batch, from_plain(plain["non_tensors"]), from_plain(plain["meta_info"]), plain["auto_padding"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The default goes through __getstate__ and would move tensors to the CPU.
        batch = None if self.batch is None else self.batch.clone()
        non_tensor_batch, meta_info = copy.deepcopy((self.non_tensor_batch, self.meta_info), memo)
        return type(self)(batch, non_tensor_batch, meta_info, self.auto_padding)

    def to(self, device: torch.device | str) -> Self:
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

    def pop(
        self,
        batch_keys: Sequence[str] = (),
        non_tensor_batch_keys: Sequence[str] = (),
        meta_info_keys: Sequence[str] = (),
    ) -> Self:
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

    def rename(self, old_keys: str | Sequence[str], new_keys: str | Sequence[str]) -> Self:
        """Rename tensor keys, in place, all at once (so two may swap); returns self.

        KeyError for an unknown key; ValueError if the lists differ in length or a new name is taken.
        """
        old_keys = [old_keys] if isinstance(old_keys, str) else list(old_keys)
        new_keys = [new_keys] if isinstance(new_keys, str) else list(new_keys)
        if len(old_keys) != len(new_keys):
            raise ValueError(f"rename: expected {len(old_keys)} new keys, got {len(new_keys)}")
        renamed = dict(zip(old_keys, new_keys, strict=True))
        self._require_tensors(old_keys)
        names = [renamed.get(key, key) for key in self._tensors()]
        if len(set(names)) < len(names):
            raise ValueError(f"rename: expected distinct keys, got {names}")
        if renamed:
            tensors = dict(zip(names, self._tensors().values(), strict=True))
            self.batch = TensorDict(tensors, batch_size=self.batch.batch_size, device=self.batch.device)
        return self

    def slice(self, start: int | None = None, end: int | None = None, step: int | None = None) -> Self:
        """Rows start:end:step as a view: writing to its tensors writes to self's."""
        return self[slice(start, end, step)]

    def reorder(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Permute the rows in place: new row i is old row indices[i]. ValueError unless a permutation of 0..B-1."""
        rows = self._row_numbers(indices)
        if not np.array_equal(np.sort(rows), np.arange(len(self))):
            raise ValueError(f"reorder: expected a permutation of {len(self)} rows, got {len(rows)} indices")
        moved = self.select_idxs(rows)
        self.batch, self.non_tensor_batch = moved.batch, moved.non_tensor_batch

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> Self:
        """Repeat every row: interleaved a a b b (copies of a prompt adjacent), otherwise a b a b."""
        rows = np.arange(len(self))
        return self.select_idxs(np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times))

    def sample_level_repeat(self, repeat_times: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """Repeat row i repeat_times[i] times, copies adjacent. ValueError unless there is one count per row."""
        counts = np.asarray(repeat_times, dtype=np.int64)
        if counts.shape != (len(self),):
            raise ValueError(f"sample_level_repeat: expected {len(self)} counts, got shape {counts.shape}")
        return self.select_idxs(np.repeat(np.arange(len(self)), counts))

    def unfold_column_chunks(self, n_split: int, split_keys: Sequence[str] | None = None) -> Self:
        """Cut columns into n_split chunks along dim 1, (B, n_split * m, ...) -> (B * n_split, m, ...).

        Row b * n_split + j holds chunk j of row b; keys not split repeat row b. split_keys None splits every tensor of
        rank >= 2. KeyError for a key that is no tensor here, ValueError for a dim 1 that n_split does not divide.
        """
        if split_keys is None:
            split_keys = [key for key, value in self._tensors().items() if value.ndim >= 2]
        self._require_tensors(split_keys)
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

    def make_iterator(
        self,
        mini_batch_size: int,
        epochs: int,
        seed: int | None = None,
        dataloader_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[Self]:
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


# ---------------------------------------------------------------- functions of tables


def list_of_dict_to_dict_of_list(list_of_dict: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """[{"a": 1}, {"a": 2}] -> {"a": [1, 2]}. ValueError if the dicts' keys differ."""
    if not list_of_dict:
        return {}
    keys = list_of_dict[0].keys()
    for row, values in enumerate(list_of_dict):
        if values.keys() != keys:
            raise ValueError(f"dict {row}: expected keys {sorted(keys)}, got {sorted(values)}")
    return {key: [values[key] for values in list_of_dict] for key in keys}


def fold_batch_dim(data: TableMethods, new_batch_size: int) -> TableMethods:
    """Group adjacent rows, (B, ...) -> (new_batch_size, B // new_batch_size, ...). ValueError if not divisible."""
    if len(data) % new_batch_size:
        raise ValueError(f"fold_batch_dim: expected {new_batch_size} to divide the row count, got {len(data)}")
    shape = (new_batch_size, len(data) // new_batch_size)
    return _reshape_rows(data, shape, batch_dims=1)


def unfold_batch_dim(data: TableMethods, batch_dims: int = 2) -> TableMethods:
    """Undo `fold_batch_dim`: merge the first batch_dims dimensions of every column, (B, N, ...) -> (B * N, ...)."""
    columns = [*data._tensors().values(), *data.non_tensor_batch.values()]
    rows = int(np.prod(columns[0].shape[:batch_dims])) if columns else 0
    return _reshape_rows(data, (rows,), batch_dims)


def _reshape_rows(data: TableMethods, shape: tuple[int, ...], batch_dims: int) -> TableMethods:
    def reshape(value: Any) -> Any:
        return value.reshape(*shape, *value.shape[batch_dims:])

    tensors = {key: reshape(value) for key, value in data._tensors().items()}
    batch = None if data.batch is None else TensorDict(tensors, batch_size=shape[:1], device=data.batch.device)
    return data._derive(batch, {key: reshape(value) for key, value in data.non_tensor_batch.items()})


def all_gather_data_proto(data: TableMethods, process_group: torch.distributed.ProcessGroup | None) -> None:
    """Replace data's rows, in place, by those of all ranks in rank order; each rank keeps its device and meta_info."""
    parts: list[Any] = [None] * torch.distributed.get_world_size(process_group)
    own_rows = data.select(meta_info_keys=())
    torch.distributed.all_gather_object(parts, own_rows, group=process_group)
    gathered = data.concat(parts)
    devices = {tensor.device for tensor in data._tensors().values()}
    if devices:
        gathered.to(devices.pop())  # pickling brought them to the CPU
    data.batch, data.non_tensor_batch = gathered.batch, gathered.non_tensor_batch
