"""`use_shm`: a model folder's copy in the machine's shared memory, so that only the first reading waits for the disk.

A copy is made once per machine and stays for later runs, until the folder changes or somebody deletes it:

    /dev/shm/verl-UID/NAME-PATH-CONTENTS/     PATH and CONTENTS are digests: of the folder's path; of what is in it
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from verl.config import ModelConfig
from verl.models.finding import base_of, find_model
from verl.utils.checkpoint.checksums import CHECKSUMS, write_checksums
from verl.utils.checkpoint.whole import FSDP_CONFIG, part_checksums
from verl.utils.units import GIB

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# Weights in formats that are not read where there are safetensors.
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}


def model_folder(model: ModelConfig, root: Path = SHARED_MEMORY) -> str:
    """The folder to read the model's weights from: `model.path`, of adapters their base; or with `use_shm` its copy,
    which is made if there is none."""
    folder = str(base_of(model.path))
    return str(copy_to_shm(folder, root)) if model.use_shm else folder


def copy_to_shm(path: str | Path, root: Path = SHARED_MEMORY) -> Path:
    """The copy of a Hugging Face or checkpoint folder under `root`, made now unless it is there already.

    Any number of processes may ask at once: one copies, the others wait for it. An older copy of the same folder is
    deleted. Of a Hugging Face folder the files are copied and its subfolders are not; of a checkpoint's folder, the
    model without its optimizer.

    Raises:
        FileNotFoundError: the folder holds no model (see `find_model`).
        PermissionError: the folder for this user's copies belongs to another user.
        OSError: `root` lacks the room.
    """
    source = Path(path).expanduser().resolve()
    files = _files(source)
    copies = _own_folder(root)
    address = f"{source.name}-{_digest(str(source))}"
    target = copies / f"{address}-{_digest(_listing(source, files))}"
    with FileLock(copies / f"{address}.lock"):
        if target.is_dir():
            logger.info("reading %s from its copy in %s", source, target)
        else:
            for outdated in copies.glob(f"{address}-*"):
                shutil.rmtree(outdated)
            _copy(source, files, target)
    return target


def _files(source: Path) -> list[Path]:
    """The files that loading the model reads, relative to `source`."""
    model = find_model(source)
    if model.shards is None:
        files = [file for file in sorted(model.huggingface.iterdir()) if file.is_file()]
    else:
        folders = (model.huggingface, model.shards)
        files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        files += [file for file in (source / FSDP_CONFIG,) if file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in OTHER_WEIGHTS]
    return [file.relative_to(source) for file in files]


def _own_folder(root: Path) -> Path:
    """The folder for this user's copies. Everyone may write to shared memory, and models from there are trusted."""
    folder = root / f"verl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat().st_uid
    if folder.is_symlink() or owner != os.getuid():
        raise PermissionError(
            f"{folder} should be a folder of user {os.getuid()} and belongs to {owner}: models would be read from it "
            "as they stand; have it deleted, or set use_shm=False"
        )
    return folder


def _listing(source: Path, files: list[Path]) -> str:
    stats = [(file, (source / file).stat()) for file in files]
    return "\n".join(f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _copy(source: Path, files: list[Path], target: Path) -> None:
    """Copy under another name and rename: a folder with the right name is whole."""
    needed = sum((source / file).stat().st_size for file in files)
    _check_room(source, needed, target.parent)
    logger.info("copying %s (%.1f GiB) to %s", source, needed / GIB, target)
    start = time.monotonic()
    partial = target.with_name(f"{target.name}.partial")
    for folder in {file.parent for file in files}:
        (partial / folder).mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda file: shutil.copyfile(source / file, partial / file), files))
    except BaseException:
        # What is left here is taken from the machine's memory.
        shutil.rmtree(partial)
        raise
    sums = part_checksums(source)
    if sums is not None:
        # An older checkpoint has them one folder up, where the copy would not find them.
        write_checksums(partial / CHECKSUMS, sums)
    partial.rename(target)
    logger.info("copied %s in %.1f s", source, time.monotonic() - start)


def _check_room(source: Path, needed: int, copies: Path) -> None:
    free = shutil.disk_usage(copies).free
    if needed <= free:
        return
    folders = sorted(path for path in copies.iterdir() if path.is_dir())
    others = ", ".join(f"{folder} ({_size(folder) / GIB:.1f} GiB)" for folder in folders)
    raise OSError(
        f"use_shm: the copy of {source} needs {needed / GIB:.1f} GiB and {copies} has {free / GIB:.1f} GiB free: "
        + (f"delete copies of other models ({others}), " if others else "")
        + "give the container more shared memory (docker run --shm-size), or set use_shm=False"
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
