"""Models' files on their way into the system's memory before anybody loads them, several at a time.

Nothing is kept of what is read here: whoever loads a model afterwards, or at the same time, finds in memory what would
have come from a disk or over a network. So it changes no value and no order; what is wrong with a file is found by who
loads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from verl.models.finding import find_model
from verl.utils.background import Background
from verl.utils.checkpoint.whole import weight_files
from verl.utils.startup import noted_beside

logger = logging.getLogger(__name__)

AT_A_TIME = 4
CHUNK_BYTES = 1 << 24


def files_of(path: str | Path) -> list[Path]:
    """The files that a model's weights are read from, of adapters those of their base. Errors as of `find_model`."""
    source = find_model(path)
    if source.adapter is not None:
        return files_of(source.adapter.base)
    if source.shards is not None:
        return sorted(source.shards.glob("*.safetensors"))
    return weight_files(source.huggingface)


def read_ahead(paths: Iterable[str | Path], most_bytes: float) -> Background:
    """Begin to read the weights of these models, which several may share, in the background.

    Args:
        most_bytes: no file is begun that would make it more: memory that is full drops what was read first.
    """
    return Background(lambda: _read(list(paths), most_bytes), "reading models ahead")


def _read(paths: Sequence[str | Path], most_bytes: float) -> None:
    try:
        with noted_beside("reading the models' files"), ThreadPoolExecutor(AT_A_TIME) as threads:
            list(threads.map(_pass_over, _fitting(paths, most_bytes)))
    except (OSError, ValueError) as error:
        logger.info("the models' files are not read ahead: %s", error)


def _fitting(paths: Sequence[str | Path], most_bytes: float) -> list[Path]:
    """The files of these models, each once, as far as they fit."""
    files = dict.fromkeys(file.resolve() for path in paths for file in files_of(path))
    fitting = []
    for file in files:
        most_bytes -= file.stat().st_size
        if most_bytes >= 0:
            fitting.append(file)
    return fitting


def _pass_over(file: Path) -> None:
    chunk = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(chunk):
            pass
