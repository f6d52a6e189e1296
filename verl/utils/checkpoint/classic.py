"""The folders that verl's classic trainer leaves: `model_world_size_W_rank_R.pt`, the pickled state dict of each rank.

Nothing of a pickle is run. `torch.load(weights_only=True)` makes the tensors; what else FSDP puts into such files, from
DTensor to DeviceMesh, becomes a record of what was pickled (`STAND_INS`), and a file that names anything else is
refused. Records are read where the classes themselves would not do: a ShardedTensor insists on a process group, and a
DeviceMesh of one version of torch is none of another's.

Files are mapped, not read: a tensor takes memory when it is put together.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from verl.utils.checkpoint.file_names import RANK_FILE
from verl.utils.checkpoint.whole import FSDP_CONFIG, how_it_was_trained, refuse_pointer


def rank_files(folder: Path) -> list[Path]:
    """The files of all ranks, by rank.

    Raises:
        ValueError: names what is missing or does not belong.
    """
    found = {
        (int(match[1]), int(match[2])): file
        for file in folder.iterdir()
        if (match := RANK_FILE.fullmatch(file.name)) is not None
    }
    worlds = sorted({world for world, _ in found})
    said = _said_world(folder)
    if len(worlds) != 1 or said not in (None, *worlds):
        got = f"some of {' and of '.join(map(str, worlds))} ranks"
        got += "" if said is None else f", and {FSDP_CONFIG} says {said}"
        raise ValueError(
            f"expected the files of one world in {folder}, got {got}: remove those of the other run, or copy the "
            "checkpoint again"
        )
    world = worlds[0]
    foreign = [file.name for (_, rank), file in sorted(found.items()) if rank >= world]
    missing = [f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world) if (world, rank) not in found]
    if missing or foreign:
        faults = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"foreign: {', '.join(foreign)}"] * bool(foreign)
        raise ValueError(
            f"{folder} is not whole: expected the files of ranks 0 to {world - 1}, got {len(found)} files "
            f"({'; '.join(faults)}); copy the checkpoint again, or take another"
        )
    return [found[world, rank] for rank in range(world)]


def _said_world(folder: Path) -> int | None:
    """The number of ranks that fsdp_config.json names, if it is there."""
    file = folder / FSDP_CONFIG
    if not file.is_file():
        return None
    return how_it_was_trained(file, "world_size", int)


def check_rank_files(files: Sequence[Path]) -> None:
    """Compare the content of every file with the checksums that torch.save has put into it; several at a time.

    Raises:
        ValueError: names the file that is damaged or cut short.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(_check_rank_file, files))


def _check_rank_file(file: Path) -> None:
    refuse_pointer(file)
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        broken = error
    if broken is not None:
        raise ValueError(
            f"{file} is damaged or cut short: expected a whole file of torch.save, got {file.stat().st_size} bytes "
            f"with an error in them ({broken}); copy it again"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading one file


class Record:
    """What was pickled of an object: the arguments that it was to be made with, and its attributes."""

    args: tuple
    fields: dict[str, Any]

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.fields = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.fields = _fields(state)


class ShardRecord(Record):
    """A placement: cut along a dimension."""

    @property
    def dim(self) -> int:
        """The dimension; some versions pickle it as an argument, others as an attribute."""
        return self.fields["dim"] if self.fields else self.args[0]


class ReplicateRecord(Record):
    """A placement: whole on every rank."""


class ShardedRecord(torch.Tensor):
    """A rank's part of a tensor: it has the shape of the whole and no values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> None:
        raise TypeError(f"{function} of a tensor of which there is one rank's part")


class DTensorRecord(ShardedRecord):
    """A part that its mesh and placements say the place of."""

    def __setstate__(self, state: Any) -> None:
        fields = _fields(state)
        self.local, spec = fields["_local_tensor"], fields["_spec"].fields
        self.placements = spec["placements"]
        self.coordinate = tuple(spec["mesh"].fields["_coordinate_on_dim"])


class ShardedTensorRecord(ShardedRecord):
    """A part that has its own place with it."""

    def __setstate__(self, state: Any) -> None:
        shards = [shard.fields for shard in state[0]]
        # (offset along the first dimension, values)
        self.shards = [(shard["metadata"].fields["shard_offsets"][0], shard["tensor"]) for shard in shards]


def _fields(state: Any) -> dict[str, Any]:
    """Attributes by name, those of `__dict__` and those of slots."""
    parts = state if isinstance(state, tuple) else (state,)
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def _nested(owner: type, name: str) -> type:
    """`ShardedTensor.ProcessGroupState`, which is pickled as a getattr. Nothing else is looked up."""
    if owner is not ShardedTensorRecord or name != "ProcessGroupState":
        raise pickle.UnpicklingError(f"Unsupported GLOBAL builtins.getattr of {name!r}")
    return Record


_TENSORS = ("torch.distributed.tensor", "torch.distributed._tensor", "torch.distributed._tensor.api",
            "torch.distributed.tensor._api")  # fmt: skip
_PLACEMENTS = ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")
_SPECS = ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor._dtensor_spec",
          "torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")  # fmt: skip
_SHARD = "torch.distributed._shard"
# What becomes of every name that such a file may hold beside those of plain tensors.
STAND_INS: list[tuple[Callable, str]] = [
    *((DTensorRecord, f"{module}.DTensor") for module in _TENSORS),
    *((ShardRecord, f"{module}.Shard") for module in _PLACEMENTS),
    *((ReplicateRecord, f"{module}.Replicate") for module in _PLACEMENTS),
    *((Record, f"{module}.{name}") for module in _PLACEMENTS for name in ("Partial", "_Partial", "_StridedShard")),
    *((Record, f"{module}.{name}") for module in _SPECS for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")),
    (Record, "torch.distributed.device_mesh.DeviceMesh"),
    (Record, "torch.distributed._tensor.device_mesh.DeviceMesh"),
    (Record, "torch.distributed._mesh_layout._MeshLayout"),
    (Record, "torch.distributed._mesh_layout._FlatLayout"),
    (ShardedTensorRecord, f"{_SHARD}.sharded_tensor.api.ShardedTensor"),
    (Record, f"{_SHARD}.sharded_tensor.shard.Shard"),
    (Record, f"{_SHARD}.metadata.ShardMetadata"),
    (Record, f"{_SHARD}.sharded_tensor.metadata.ShardedTensorMetadata"),
    (Record, f"{_SHARD}.sharded_tensor.metadata.TensorProperties"),
    (Record, f"{_SHARD}.sharded_tensor.metadata.MEM_FORMAT_ENCODING"),
    (Record, f"{_SHARD}.sharding_spec.chunk_sharding_spec.ChunkShardingSpec"),
    (Record, f"{_SHARD}.sharding_spec.api.EnumerableShardingSpec"),
    (Record, "torch.distributed.remote_device._remote_device"),
    (_nested, "builtins.getattr"),
]


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Within the block, torch.load knows these names in the place of those that torch itself has registered."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals(STAND_INS)
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def read_rank(file: Path) -> dict[str, torch.Tensor]:
    """One rank's state dict, its tensors mapped from the file.

    Raises:
        ValueError: the file holds anything but a state dict of FSDP's; nothing of it was run.
    """
    try:
        with _only_stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the name {named[1]}" if named else " ".join(str(error.__context__ or error).split())[:200]
        raise ValueError(
            f"{file} is refused, and nothing of it was run: expected tensors as FSDP shards them, got {what}; if the "
            "file is yours, save its state dict again without that"
        ) from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"{file} is no state dict of FSDP's, or damaged ({error}); copy it again") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"expected a state dict of tensors in {file}, got something else: take a checkpoint's model_*")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Putting tensors together


class RankFiles:
    """The state dicts of all ranks, in the order of `files`.

    Raises:
        ValueError: see `read_rank`; and every method, where the ranks' parts do not make a tensor.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.ranks = [read_rank(file) for file in files]

    def names(self) -> list[str]:
        """Every tensor's name. What FSDP1 computes with, all of a layer in one, is there a second time and left out."""
        names = dict.fromkeys(name for rank in self.ranks for name in rank)
        return [name for name in names if name.rpartition(".")[2] != "_flat_param"]

    def shape(self, name: str) -> torch.Size | None:
        """The whole tensor's shape, where a rank's part says it."""
        part = next(rank[name] for rank in self.ranks if name in rank)
        return part.shape if isinstance(part, ShardedRecord) else None

    def dtype(self, name: str) -> torch.dtype:
        """The type of the values."""
        return next(rank[name] for rank in self.ranks if name in rank).dtype

    def parts(self, name: str, shape: torch.Size) -> tuple[list[torch.Tensor], int]:
        """The parts that make up the tensor, in order, and the dimension along which."""
        parts = [rank.get(name) for rank in self.ranks]
        kinds = {type(part) for part in parts if part is not None}
        if len(kinds) != 1:
            raise self._wrong(name, shape, "parts of several kinds")
        kind = kinds.pop()
        lacking = [file.name for file, part in zip(self.files, parts, strict=True) if part is None]
        if issubclass(kind, ShardedRecord) and lacking:
            raise self._wrong(name, shape, f"nothing in {lacking[0]}")
        if kind is DTensorRecord:
            found, dim = self._of_mesh(name, parts)
        elif kind is ShardedTensorRecord:
            found, dim = self._by_offsets(name, parts), 0
        else:
            found, dim = _plain([part for part in parts if part is not None], shape), 0
        if shape.numel():
            found = [part for part in found if part.numel()]
        self._check(name, found, dim, shape)
        return found, dim

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, put together in memory of its own."""
        parts, dim = self.parts(name, shape)
        return torch.cat([part.to(dtype) for part in parts], dim).reshape(shape) if shape else parts[0].to(dtype)

    def _of_mesh(self, name: str, parts: list[DTensorRecord]) -> tuple[list[torch.Tensor], int]:
        """In the mesh's order along the one axis that cuts, from the first of equal copies along the others."""
        placements = parts[0].placements
        cut = [axis for axis, placement in enumerate(placements) if not isinstance(placement, ReplicateRecord)]
        if len({part.coordinate for part in parts}) != len(parts):
            raise ValueError(f"{name}: two of the files in {self.files[0].parent} are of one rank; copy them again")
        if len(cut) > 1 or not all(isinstance(placements[axis], ShardRecord) for axis in cut):
            raise ValueError(
                f"{name} in {self.files[0]} is sharded otherwise than by FSDP (tensor parallel, perhaps): expected one "
                f"cut, got {len(cut)}; only FSDP's checkpoints are merged"
            )
        first = [part for part in parts if not any(c for axis, c in enumerate(part.coordinate) if axis not in cut)]
        if not cut:
            return [first[0].local], 0
        ordered = sorted(first, key=lambda part: part.coordinate[cut[0]])
        return [part.local for part in ordered], placements[cut[0]].dim

    def _by_offsets(self, name: str, parts: list[ShardedTensorRecord]) -> list[torch.Tensor]:
        """In the order of the places that they have with them, which have to lie end to end."""
        shards = sorted((shard for part in parts for shard in part.shards), key=lambda shard: shard[0])
        end = 0
        for offset, tensor in shards:
            if offset != end:
                raise self._wrong(name, parts[0].shape, f"parts that begin at {[place for place, _ in shards]}")
            end += tensor.shape[0]
        return [tensor for _, tensor in shards]

    def _check(self, name: str, parts: list[torch.Tensor], dim: int, shape: torch.Size) -> None:
        if not shape and len(parts) == 1 and parts[0].numel() == 1:
            return
        flat = len(parts) > 0 and parts[0].dim() == 1
        wanted = torch.Size([shape.numel()]) if flat else shape
        others = [
            {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts},
            {(*wanted[:dim], *wanted[dim + 1 :])},
        ]
        if not parts or others[0] != others[1] or sum(part.shape[dim] for part in parts) != wanted[dim]:
            raise self._wrong(name, shape, f"parts of {', '.join(str(tuple(part.shape)) for part in parts)}")

    def _wrong(self, name: str, shape: torch.Size, got: str) -> ValueError:
        return ValueError(
            f"{name}: expected a tensor of {tuple(shape)} from the {len(self.files)} files in {self.files[0].parent}, "
            f"got {got}; copy all files of one checkpoint again, with their huggingface/config.json"
        )


def _plain(parts: list[torch.Tensor], shape: torch.Size) -> list[torch.Tensor]:
    """Parts that say nothing of their place: a whole tensor, which every rank has, or pieces in the ranks' order."""
    return parts[:1] if parts[0].shape == shape else parts
