"""What is in a model's folder or in files, however they are called and wherever they lie."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.models.finding import find_model
from verl.utils.checkpoint.whole import BASE_QUANTIZATION, part_checksums, weight_files
from verl.utils.hub import hub_origin

# Of a file of weights, so many bytes in so many places: training moves all of them.
PLACES, PIECE = 8, 1 << 16
# What a folder says of its model beside the weights, and of how its answers end; code of its own (*.py) too.
SAYS = ("config.json", "adapter_config.json", "generation_config.json")


@dataclass(frozen=True)
class Content:
    """The path of a model or a data file, or its name on the hub with the commit, and what is in it.

    revision: the commit, or commits of several files; None of what does not come from the hub.
    """

    where: str
    digest: int
    revision: str | None = None

    def differs(self, now: Content) -> bool:
        """Whether `now` is something else: another content, or another commit."""
        commits = {self.revision, now.revision} - {None}
        return self.digest != now.digest or len(commits) > 1


def content_of_model(path: str) -> Content:
    """A model, by the contents of its weights; adapters by theirs and their base's."""
    source = find_model(path)
    if source.adapter is not None:
        beside = source.adapter.folder / BASE_QUANTIZATION
        own = digest_of([_sample(file) for file in [*source.adapter.files, *([beside] if beside.is_file() else [])]])
        return content_of([path], digest_of([own, content_of_model(source.adapter.base).digest]))
    sums = None if source.shards is None else part_checksums(source.shards.parent)
    if sums is not None:
        return Content(path, digest_of([value for name, value in sorted(sums.items()) if name.startswith("model/")]))
    files = sorted(source.shards.glob("*.safetensors")) if source.shards else weight_files(source.huggingface)
    return content_of([path], digest_of([_sample(file) for file in files]))


def words_of_model(path: str) -> list[str]:
    """What the folder says of it, and the code that it brings: with the same weights another model."""
    source = find_model(path)
    folders = [source.huggingface] if source.adapter is None else [source.huggingface, source.adapter.folder]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    return [file.read_text(encoding="utf-8") for file in files if file.name in SAYS or file.suffix == ".py"]


def content_of(paths: Sequence[str | Path], digest: int) -> Content:
    """Files or a folder, of which all that is in them has this digest."""
    origins = [hub_origin(path) for path in paths]
    names = [str(path) if origin is None else origin.where for path, origin in zip(paths, origins, strict=True)]
    commits = sorted({origin.commit for origin in origins if origin is not None})
    return Content(", ".join(names), digest, ", ".join(commits) or None)


def digest_of(values: list[int]) -> int:
    """One of many, in their order."""
    return zlib.crc32(json.dumps(values).encode())


def _sample(file: Path) -> int:
    size, value = file.stat().st_size, 0
    with file.open("rb") as stream:
        for place in range(PLACES + 1):
            stream.seek(max(0, size - PIECE) * place // PLACES)
            value = zlib.crc32(stream.read(PIECE), value)
    return zlib.crc32(str(size).encode(), value)
