"""The values in a DataProto's columns: comparing, merging, picking rows, and bytes that load without running code.

Nothing here knows the table itself (`verl.protocol`), which gives these functions their public home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDict

SerializedTensor: TypeAlias = tuple[str, tuple[int, ...], bytes]
SerializedTensorDict: TypeAlias = tuple[tuple[int, ...], dict[str, SerializedTensor]]
RowIndex: TypeAlias = Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor


# ---------------------------------------------------------------- values


def object_array(key: str, values: Any) -> np.ndarray:
    """A column of objects. A list stays 1-D whatever its items are; an ndarray keeps the shape its owner gave it."""
    if isinstance(values, np.ndarray) and values.ndim >= 1:
        return values.astype(object, copy=False)
    if isinstance(values, list | tuple):
        # np.array would turn a list of equal-length lists into a 2-D array.
        return np.fromiter(values, dtype=object, count=len(values))
    raise TypeError(f"non-tensor {key!r}: expected a list or an ndarray of rank >= 1, got {type(values).__name__}")


def equal(a: Any, b: Any) -> bool:
    """Deep equality in which NaN equals NaN. Tensors must agree in dtype too, but not in device."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        b = b.to(a.device)
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and all(map(equal, a.flat, b.flat))
    if isinstance(a, torch.Tensor | np.ndarray) or isinstance(b, torch.Tensor | np.ndarray):
        return False
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float | np.floating) and isinstance(b, float | np.floating) and np.isnan(a):
        return bool(np.isnan(b))
    return bool(a == b)


def refuse_conflicts(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for key in ours.keys() & theirs.keys():
        if not equal(ours[key], theirs[key]):
            raise ValueError(f"union: {kind} key {key!r} has different values on the two sides")


def row_indices(index: RowIndex, length: int) -> np.ndarray:
    """Turn integers (negative ones count from the end) or a bool mask into row numbers, int64 of shape (rows,).

    Raises IndexError for a row out of range, ValueError for a wrong rank or mask length, TypeError for other dtypes.
    """
    rows = index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    if rows.ndim != 1:
        raise ValueError(f"row index must be 1-D, got shape {rows.shape}")
    if rows.dtype == bool:
        if len(rows) != length:
            raise ValueError(f"bool mask: expected length {length}, got {len(rows)}")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"row index must be integers or bools, got dtype {rows.dtype}")
    if rows.min() < -length or rows.max() >= length:
        raise IndexError(f"row index in [{rows.min()}, {rows.max()}] is out of range for {length} rows")
    return rows.astype(np.int64) % length


def union_tensor_dict(tensor_dict1: TensorDict, tensor_dict2: TensorDict) -> TensorDict:
    """Add the second's keys to the first, in place. ValueError if batch sizes or the values of a shared key differ."""
    if tensor_dict1.batch_size != tensor_dict2.batch_size:
        raise ValueError(
            f"union: expected batch size {tuple(tensor_dict1.batch_size)}, got {tuple(tensor_dict2.batch_size)}"
        )
    refuse_conflicts("tensor", dict(tensor_dict1.items()), dict(tensor_dict2.items()))
    for key in tensor_dict2.keys() - tensor_dict1.keys():
        tensor_dict1[key] = tensor_dict2[key]
    return tensor_dict1


def union_numpy_dict(array_dict1: dict[str, np.ndarray], array_dict2: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the second's keys to the first, in place. ValueError if a shared key's values differ; NaN equals NaN."""
    refuse_conflicts("non-tensor", array_dict1, array_dict2)
    array_dict1.update({key: value for key, value in array_dict2.items() if key not in array_dict1})
    return array_dict1


# ---------------------------------------------------------------- serialisation


def serialize_single_tensor(tensor: torch.Tensor) -> SerializedTensor:
    """(dtype name, shape, raw bytes) of a dense tensor on any device; a view contributes its own elements only."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16, so every dtype travels as its bytes.
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def deserialize_single_tensor(serialized: SerializedTensor) -> torch.Tensor:
    """The tensor of `serialize_single_tensor`, writable and on the CPU."""
    dtype, shape, data = serialized
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype))  # frombuffer refuses an empty buffer
    # bytearray copies: a tensor over immutable bytes could be written to.
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).reshape(shape)


def serialize_tensordict(batch: TensorDict) -> SerializedTensorDict:
    """(batch size, {key: serialised tensor}) of a flat TensorDict."""
    return tuple(batch.batch_size), {key: serialize_single_tensor(value) for key, value in batch.items()}


def deserialize_tensordict(serialized: SerializedTensorDict) -> TensorDict:
    """The TensorDict of `serialize_tensordict`, on the CPU."""
    batch_size, tensors = serialized
    return TensorDict({key: deserialize_single_tensor(value) for key, value in tensors.items()}, batch_size=batch_size)
