"""Sharded tensors on disk: torch.distributed.checkpoint in its safetensors form. No pickle is written or read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from verl.utils.checkpoint.file_names import MODEL_FOLDER, OPTIM_FOLDER, missing_shards
from verl.utils.host_memory import ALIGNMENT, host_buffer


@dataclass(frozen=True)
class Shard:
    """One rank's part of sharded tensors: a chunk of each by the tensor's name, the chunk's place in the tensor, and
    the name of the file that holds it all."""

    file: str
    chunks: dict[str, torch.Tensor]
    offsets: dict[str, list[int]]

    def write(self, folder: Path) -> None:
        """Write it into a folder that is there; nothing without chunks.

        The tensors are written from where they lie, without a copy and without holding Python's lock, so that other
        threads go on.
        """
        if not self.chunks:
            return
        file = folder / self.file
        # safetensors lets only the owner read what it writes; this has the mode of any other file.
        file.touch()
        mode = file.stat().st_mode
        places = {name: {"saved_offsets": offsets} for name, offsets in self.offsets.items()}
        # As torch.distributed.checkpoint reads it.
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        save_file({name: chunk.cpu().contiguous() for name, chunk in self.chunks.items()}, file, metadata)
        file.chmod(mode)


class _ShardWriter(HuggingFaceStorageWriter):
    """Gives the rank's shard, as planned by all ranks together, to `take` instead of writing it."""

    def __init__(self, take: Callable[[Shard], None]):
        super().__init__("", save_distributed=True)
        self.take = take

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.take(
            Shard(
                f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors",
                {item.index.fqn: planner.resolve_data(item).detach() for item in plan.items},
                {item.index.fqn: list(item.tensor_data.chunk.offsets) for item in plan.items},
            )
        )
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _plan_and_take(tensors: dict[str, torch.Tensor], take: Callable[[Shard], None], what: str) -> None:
    try:
        dcp.save(tensors, storage_writer=_ShardWriter(take), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        # No Exception: a Ray worker would die of it, and its reason with it.
        raise RuntimeError(f"{what} could not be written: {error}") from error


def write_sharded(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Every rank writes its own shards of `tensors` into `folder`; collective.

    Raises:
        RuntimeError: a rank could not.
    """

    def write(shard: Shard) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shard.write(Path(folder))

    _plan_and_take(tensors, write, str(folder))


def own_shard(tensors: dict[str, torch.Tensor]) -> Shard:
    """What this rank would write of `tensors`, sharing memory with them; collective."""
    shards: list[Shard] = []
    _plan_and_take(tensors, shards.append, "the checkpoint")
    return shards[0]


class HostShards:
    """Copies of shards in host memory, which is kept from one time to the next, pinned for CUDA tensors."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """The same with copies of the chunks, complete on return; what was copied before is overwritten."""
        chunks = [chunk for shard in shards.values() for chunk in shard.chunks.values()]
        parts = iter(self._parts(chunks))
        copies = {
            name: Shard(
                shard.file, {key: _copy(chunk, next(parts)) for key, chunk in shard.chunks.items()}, shard.offsets
            )
            for name, shard in shards.items()
        }
        if any(chunk.is_cuda for chunk in chunks):
            torch.cuda.synchronize()
        return copies

    def _parts(self, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
        """A part of the buffer for each chunk."""
        starts, total = [], 0
        for chunk in chunks:
            starts.append(total)
            total += -(-chunk.nbytes // ALIGNMENT) * ALIGNMENT
        if total != self._buffer.numel():
            # The old one goes first: both at once may be more than the host has.
            del self._buffer
            self._buffer = host_buffer(total, pinned=any(chunk.is_cuda for chunk in chunks))
        return [self._buffer[start : start + chunk.nbytes] for start, chunk in zip(starts, chunks, strict=True)]


def _copy(chunk: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    copy = part.view(chunk.dtype).view(chunk.shape)
    return copy.copy_(chunk, non_blocking=True)


def read_sharded(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Fill `tensors` in place from `folder`, written by any number of ranks; collective."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def read_full_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of `folder`, whole, on CPU; in this process alone.

    Raises:
        ValueError: names a file that is damaged or missing between others (a last one that is missing is not seen here:
            `whole.check_shards` knows how many there should be).
    """
    entries = read_layout(folder)
    check_chunks(folder, entries)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        # It warns that there is no process group; none is wanted.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def read_layout(folder: str | Path) -> dict[str, TensorStorageMetadata]:
    """Size and chunks of every tensor, from the headers of all shards; ValueError names a damaged file."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); copy the checkpoint again") from error
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def check_chunks(folder: str | Path, entries: dict[str, TensorStorageMetadata]) -> None:
    """See that every tensor's chunks lie end to end: loading would leave what is between them as it finds it.

    Chunks are cut along the first dimension, as FSDP2 cuts.

    Raises:
        ValueError: there is nothing, something is missing or there twice; names the files, as far as can be told.
    """
    if not entries:
        raise ValueError(f"{folder} holds no weights: expected *.safetensors")
    broken = [name for name, entry in entries.items() if not _end_to_end(entry)]
    if broken:
        raise ValueError(
            f"{folder} is not whole: {len(broken)} of {len(entries)} tensors have gaps or overlap, e.g. {broken[0]}; "
            f"{_suspects(Path(folder))}; copy the checkpoint again, or take another"
        )


def check_all_are_seen(part: Path) -> None:
    """ValueError if what all ranks have just written is not whole here: nodes that each have a folder of their own."""
    for shards in (part / MODEL_FOLDER, part / OPTIM_FOLDER):
        try:
            check_chunks(shards, read_layout(shards))
        except ValueError as error:
            raise ValueError(
                "what all ranks have just written is not whole in the first one's sight, so no checkpoint is made: "
                f"trainer.default_local_dir has to be one folder that all nodes share ({error})"
            ) from error


def _end_to_end(entry: TensorStorageMetadata) -> bool:
    if not entry.size:
        return len(entry.chunks) == 1
    end = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets)):
        if chunk.sizes.numel() == 0:
            continue
        if chunk.offsets[0] != end or chunk.sizes[1:] != entry.size[1:]:
            return False
        end += chunk.sizes[0]
    return end == entry.size[0]


def _suspects(folder: Path) -> str:
    missing = missing_shards(folder)
    if missing:
        return f"missing: {', '.join(missing)}"
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"not all of {', '.join(names)} are of one checkpoint"
