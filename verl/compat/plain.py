"""Values as the types that `torch.load(weights_only=True)` accepts, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def to_plain(path: str, value: Any) -> Any:
    """Rewrite a value in the types that torch.load(weights_only=True) accepts. TypeError names what cannot be."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()  # torch.save writes a view's whole storage
    if isinstance(value, np.generic):
        return to_plain(path, value.item())
    if isinstance(value, np.ndarray):
        values = [to_plain(path, item) for item in value.ravel().tolist()]
        return {"__ndarray__": values, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {to_plain(path, key): to_plain(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(path, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{path}: cannot save a {type(value).__name__}; only tensors, arrays and plain Python values")


def from_plain(value: Any) -> Any:
    """Undo `to_plain`, but for numpy scalars, which come back as Python numbers."""
    if isinstance(value, dict) and "__ndarray__" in value:
        items = value["__ndarray__"]
        # np.array would turn items of equal length into a second dimension.
        flat = np.fromiter(map(from_plain, items), dtype=object, count=len(items))
        return flat.astype(value["dtype"]).reshape(value["shape"])
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(from_plain(item) for item in value)
    return value
