"""Sharded tensors on disk: torch.distributed.checkpoint in its safetensors form. No pickle is written or read."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

MODEL_FOLDER, OPTIM_FOLDER = "model", "optim"
# One file of each rank, counted from 1.
SHARD = re.compile(r"shard-(\d{5})-.*\.safetensors")


def write_sharded(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Every rank writes its own shards of `tensors` into `folder`; collective.

    Raises:
        RuntimeError: a rank could not.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        # No Exception: a Ray worker would die of it, and its reason with it.
        raise RuntimeError(f"{folder} could not be written: {error}") from error


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


def missing_shards(folder: Path, ranks: int | None = None) -> list[str]:
    """The names of files that the first `ranks` ranks would have written and that are not there; without a number, of
    those before the last one that is there."""
    there = {int(match[1]): file.name for file in folder.glob("*.safetensors") if (match := SHARD.fullmatch(file.name))}
    if not there:
        return []
    number, name = next(iter(there.items()))
    last = max(there) if ranks is None else ranks
    return [name.replace(f"{number:05d}", f"{n:05d}", 1) for n in range(1, last + 1) if n not in there]


def _suspects(folder: Path) -> str:
    missing = missing_shards(folder)
    if missing:
        return f"missing: {', '.join(missing)}"
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"not all of {', '.join(names)} are of one checkpoint"
