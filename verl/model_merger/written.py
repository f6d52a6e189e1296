"""What a merged folder holds: the type and size of its weights, and files that others may read as the umask says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from verl.models.finding import config_entries
from verl.utils.checkpoint.room import amount
from verl.utils.checkpoint.whole import weight_files

# As a safetensors file's header calls them.
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Weights:
    """A folder's weights: how many numbers, of which type, in how many files of how many bytes together."""

    parameters: int
    dtype: torch.dtype
    files: int
    size: int

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{self.parameters:,} parameters in {name_of(self.dtype)}, {amount(self.size)} in {files}"


def name_of(dtype: torch.dtype) -> str:
    """As flags and config.json have it."""
    return str(dtype).removeprefix("torch.")


def weights_in(folder: Path) -> Weights:
    """Of a merged folder. ValueError where it is no folder of safetensors."""
    files = weight_files(folder)
    types, parameters = set(), 0
    for file in files:
        if file.suffix != ".safetensors":
            raise ValueError(f"expected safetensors in {folder}, got {file.name}: merge the checkpoint again")
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the library's object is no dict
                part = tensors.get_slice(name)
                parameters += torch.Size(part.get_shape()).numel()
                types.add(part.get_dtype())
    return Weights(parameters, _one_of(types, folder), len(files), sum(file.stat().st_size for file in files))


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a folder's weights; what its config says where they are no safetensors or of several types."""
    if all(file.suffix == ".safetensors" for file in weight_files(folder)):
        return weights_in(folder).dtype
    return _one_of((), folder)


def _one_of(types: Iterable[str], folder: Path) -> torch.dtype:
    known = {TYPES[name] for name in types if name in TYPES}
    if len(known) == 1:
        return known.pop()
    entries = config_entries(folder)
    return getattr(torch, str(entries.get("dtype") or entries.get("torch_dtype") or "float32"))


def open_to_readers(folder: Path) -> None:
    """Give the files of weights the mode that a new file has: the library that writes them leaves them to their owner
    alone."""
    mode = 0o666 & ~_umask()
    for file in {*weight_files(folder), *folder.glob("*.safetensors.index.json")}:
        file.chmod(mode)


def _umask() -> int:
    """This process' umask, which can be asked for only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def refuse_overflow(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """ValueError if a weight that is finite in training is beyond float16, whose largest number is 65,504."""
    for name, tensor in tensors:
        if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values beyond float16: expected a wider type, --dtype bfloat16 or float32")
