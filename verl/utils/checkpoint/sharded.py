"""Sharded tensors on disk: torch.distributed.checkpoint in its safetensors form. No pickle is written or read."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

MODEL_FOLDER = "model"


def write_sharded(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Every rank writes its own shards of `tensors` into `folder`; collective."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def read_sharded(tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Fill `tensors` in place from `folder`, written by any number of ranks; collective."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def read_full_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of `folder`, whole, on CPU; in this process alone."""
    reader = HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        # It warns that there is no process group; none is wanted.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors
