"""How the files of sharded models are called, ours and those of verl's classic trainer. Folders are told apart by them
without torch, which takes seconds to load."""

from __future__ import annotations

import re
from pathlib import Path

MODEL_FOLDER, OPTIM_FOLDER = "model", "optim"
# One file of each rank, counted from 1.
SHARD = re.compile(r"shard-(\d{5})-.*\.safetensors")
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


def missing_shards(folder: Path, ranks: int | None = None) -> list[str]:
    """The names of files that the first `ranks` ranks would have written and that are not there; without a number, of
    those before the last one that is there."""
    there = {int(match[1]): file.name for file in folder.glob("*.safetensors") if (match := SHARD.fullmatch(file.name))}
    if not there:
        return []
    number, name = next(iter(there.items()))
    last = max(there) if ranks is None else ranks
    return [name.replace(f"{number:05d}", f"{n:05d}", 1) for n in range(1, last + 1) if n not in there]


def is_classic(folder: str | Path) -> bool:
    """Whether the folder holds files of verl's classic trainer."""
    return any(RANK_FILE.fullmatch(file.name) for file in Path(folder).glob("model_world_size_*.pt"))
