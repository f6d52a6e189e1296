"""Is a model's folder whole? Asked before it is used as a model; resuming asks it of whole checkpoints.

A checkpoint's `actor` or `critic` folder has the checksums of its files in it, so that it may be copied away from its
checkpoint; those of older checkpoints are one folder up only. A Hugging Face folder has none: there it is seen whether
the weights that it names are there, and whole by their own account.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from verl.utils.checkpoint.checksums import CHECKSUMS, checksums_of, read_checksums
from verl.utils.checkpoint.file_names import MODEL_FOLDER, SHARD, missing_shards
from verl.utils.lfs import LFS_POINTER

logger = logging.getLogger(__name__)

FSDP_CONFIG, HUGGINGFACE = "fsdp_config.json", "huggingface"
# What PEFT calls it: beside adapters, in a checkpoint as elsewhere.
ADAPTER_CONFIG = "adapter_config.json"
# Ours: that the base of adapters was in 4 bits.
BASE_QUANTIZATION = "base_quantization.json"
# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Nanoseconds between two times that a file system tells apart, generously.
GRAIN_OF_TIME = 50_000_000
# Of what stands beside the weights, whatever Git LFS may hold and a model or tokenizer is read from.
READ_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")


def part_checksums(part: Path) -> dict[str, int] | None:
    """The checksums of a checkpoint's `actor` or `critic` folder by names in it: its own, else those of the checkpoint
    that it lies in; None where there are none."""
    if (part / CHECKSUMS).is_file():
        return read_checksums(part / CHECKSUMS)
    part = part.resolve()
    above = part.parent / CHECKSUMS
    if not above.is_file():
        return None
    prefix = f"{part.name}/"
    sums = {
        name.removeprefix(prefix): value for name, value in read_checksums(above).items() if name.startswith(prefix)
    }
    return sums or None


def check_part(part: Path, contents: bool = True) -> None:
    """Look at what a model is read from in a checkpoint's `actor` or `critic` folder; its optimizer may be missing.

    Args:
        contents: compare the files' contents with their checksums too, once per process; not only names and shards.

    Raises:
        ValueError: names the files that are missing, changed, or another checkpoint's.
    """
    sums = part_checksums(part)
    if sums is None:
        _refuse_half_a_checkpoint(part)
        logger.warning(
            "%s has no %s, in it or beside it: that its shards fit together is seen, and damage within them is not",
            part, CHECKSUMS,
        )  # fmt: skip
    else:
        used = {name: value for name, value in sums.items() if name in _READ or _top(name) in _READ}
        faults = _missing(part, used) | _foreign(part, used)
        if contents:
            present = {name: value for name, value in used.items() if (part / name).is_file()}
            faults |= dict.fromkeys(changed_files(part, present), "changed since it was written")
        if faults:
            raise ValueError(_sentence(part, faults))
    check_shards(part)


_READ = (FSDP_CONFIG, BASE_QUANTIZATION, MODEL_FOLDER, HUGGINGFACE)


def _refuse_half_a_checkpoint(part: Path) -> None:
    """Without checksums, a folder that was copied from an older checkpoint is taken as it is; what lies in a whole
    checkpoint should have them beside it."""
    above = part.resolve().parent
    if above.suffix == ".tmp" or (above / "trainer_state.json").is_file():
        raise FileNotFoundError(
            f"{above / CHECKSUMS} is missing, so {above} was never completed or not copied whole; take another "
            "checkpoint"
        )


def _top(name: str) -> str:
    return Path(name).parts[0]


def _missing(part: Path, sums: dict[str, int]) -> dict[str, str]:
    return {name: "missing" for name in sums if not (part / name).is_file()}


def _foreign(part: Path, sums: dict[str, int]) -> dict[str, str]:
    """Shards that the checkpoint was written without: all in the folder are read."""
    there = (str(file.relative_to(part)) for file in sorted((part / MODEL_FOLDER).glob("*.safetensors")))
    return {name: "not this checkpoint's" for name in there if name not in sums}


def changed_files(folder: Path, sums: Mapping[str, int]) -> list[str]:
    """The names of those files in `folder` whose content has another checksum; a process reads the same files once."""
    names = tuple(sorted(sums.items()))
    stats = [(folder / name).stat() for name, _ in names]
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    # A file as young as this might change once more without getting another time.
    settled = all(time.time_ns() - written > GRAIN_OF_TIME for _, written in stamps)
    return (_changed if settled else _changed.__wrapped__)(folder, names, stamps)


@lru_cache(maxsize=64)
def _changed(folder: Path, sums: tuple[tuple[str, int], ...], stamps: tuple[tuple[int, int], ...]) -> list[str]:
    found = checksums_of(folder, (name for name, _ in sums))
    return [name for name, value in sums if found[name] != value]


def _sentence(part: Path, faults: dict[str, str]) -> str:
    named = ", ".join(f"{name} ({fault})" for name, fault in sorted(faults.items()))
    return f"{part} is not the checkpoint that was written: {named}; copy it again, or take another checkpoint"


def check_shards(part: Path) -> None:
    """See that the shards are those of all ranks and make whole tensors.

    Raises:
        FileNotFoundError, ValueError: names the files that are missing, damaged or do not belong.
    """
    # It takes torch, which finding a folder does not.
    from verl.utils.checkpoint.sharded import check_chunks, read_layout

    check_chunks(part / MODEL_FOLDER, read_layout(part / MODEL_FOLDER))
    how = part / FSDP_CONFIG
    if not how.is_file():
        logger.warning("%s is missing: how many shards there should be is not known", how)
        return
    ranks = how_it_was_trained(how, "world_size", int)
    missing = missing_shards(part / MODEL_FOLDER, ranks)
    # A tiny model has nothing for the last of many ranks; the checksums then say that these wrote no file.
    if missing and part_checksums(part) is None:
        raise ValueError(
            f"{part / MODEL_FOLDER} is not whole: {ranks} ranks wrote it, and {', '.join(missing)} is missing; copy it "
            "again, or take another checkpoint"
        )
    files = sorted((part / MODEL_FOLDER).glob("*.safetensors"))
    foreign = [file.name for file in files if not (match := SHARD.fullmatch(file.name)) or int(match[1]) > ranks]
    if foreign:
        raise ValueError(
            f"{part / MODEL_FOLDER} was written by {ranks} ranks, and {', '.join(foreign)} does not belong to it; "
            "remove it, or copy the checkpoint again"
        )


def how_it_was_trained(file: Path, name: str, kind: type) -> Any:
    """A value in a checkpoint's fsdp_config.json.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))[name]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected a {name}, got {error!r}; copy it again") from error
    if type(value) is not kind:
        raise ValueError(f"{file} is damaged: expected a {kind.__name__} as {name}, got {value!r}; copy it again")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders


def refuse_pointers(folder: Path) -> None:
    """ValueError names a file that Git LFS left a pointer for, among those that a model or tokenizer is read from."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in READ_SUFFIXES:
            refuse_pointer(file)


def refuse_pointer(file: Path) -> None:
    """ValueError if Git LFS left a pointer in the file's place."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}, or download it"
            )


def check_huggingface(folder: Path) -> None:
    """See that the weights which a Hugging Face folder names are there, and of the length that they say.

    Raises:
        FileNotFoundError, ValueError: names the file that is missing or damaged.
    """
    refuse_pointers(folder)
    for file in weight_files(folder):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {folder} needs it for its weights; download or copy it again")
        refuse_pointer(file)
        if file.suffix == ".safetensors":
            _open(file)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that a Hugging Face folder names, whether they are there or not.

    Raises:
        FileNotFoundError, ValueError: it names none, or the list of them is damaged.
    """
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        whole = folder.parent
        if folder.name == HUGGINGFACE and ((whole / MODEL_FOLDER).is_dir() or any(whole.glob("model_world_size_*.pt"))):
            raise FileNotFoundError(
                f"{folder} has a checkpoint's config and tokenizer, and its weights are beside it: pass its parent, "
                f"{whole}"
            )
        raise FileNotFoundError(f"{folder} holds no weights: expected one of {', '.join(WEIGHTS)}")
    if not first.endswith(".index.json"):
        return [folder / first]
    try:
        names = set(json.loads((folder / first).read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / first} is damaged: expected a weight_map, got {error!r}") from error
    return [folder / name for name in sorted(names)]


def _open(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); download or copy it again") from error
