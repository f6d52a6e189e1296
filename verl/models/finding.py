"""Finding models: a Hugging Face folder, a checkpoint's `actor`/`critic` folder as training wrote it, or a folder of
adapters; whether it is whole, and what its config.json says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.models.adapter_folders import AdapterFolder, find_adapter
from verl.models.folders import no_model, refuse_quantized
from verl.models.reward_models import is_reward_model
from verl.utils.checkpoint.best_link import behind_best
from verl.utils.checkpoint.file_names import MODEL_FOLDER, is_classic
from verl.utils.checkpoint.whole import check_huggingface, check_part, refuse_pointer
from verl.utils.command_line import called_as


@dataclass(frozen=True)
class ModelSource:
    """The folders of a model's Hugging Face files and, if it is a checkpoint's, of its sharded weights; or adapters,
    with the rest of the weights in their base."""

    huggingface: Path
    shards: Path | None
    adapter: AdapterFolder | None = None


def find_model(path: str | Path) -> ModelSource:
    """Tell a Hugging Face folder from a checkpoint folder, and both from a folder of adapters.

    Raises:
        FileNotFoundError: the folder is neither; says what was looked for, and what to pass instead where that can be
            seen (a whole `global_step_N` folder, or one of verl's classic trainer, which has to be merged first). Or
            the base of adapters is not there.
        ValueError: the folder of adapters is damaged (see `find_adapter`).
    """
    folder = behind_best(Path(path).expanduser())
    adapter = find_adapter(folder)
    if adapter is not None:
        return ModelSource(adapter.huggingface or find_model(adapter.base).huggingface, None, adapter)
    if (folder / "huggingface" / "config.json").is_file() and (folder / MODEL_FOLDER).is_dir():
        return ModelSource(folder / "huggingface", folder / MODEL_FOLDER)
    if (folder / "config.json").is_file():
        return ModelSource(folder, None)
    if is_classic(folder):
        raise FileNotFoundError(
            f"{folder} was written by verl's classic trainer and has to be merged first: run "
            f"`{called_as('verl.model_merger')} --local_dir {folder} --target_dir OUT`, and give OUT instead"
        )
    raise FileNotFoundError(no_model(folder))


def base_of(path: str | Path) -> str | Path:
    """The folder that most of a model's weights are in: that of the base of adapters, else this one."""
    adapter = find_model(path).adapter
    return path if adapter is None else adapter.base


def check_files(path: str | Path, contents: bool = True) -> None:
    """See that a model folder is whole before it is used.

    Of a checkpoint's folder, shards are counted and everything that a model is read from is compared with its
    checksums, once per process; `contents=False` leaves the contents out. Of a Hugging Face folder, the weights that it
    names have to be there, and whole by their own account. Of adapters both are asked, and of their base.

    Raises:
        FileNotFoundError, ValueError: names the file that is missing, damaged, not this checkpoint's or a Git LFS
            pointer.
    """
    source = find_model(path)
    if source.adapter is not None:
        source.adapter.check(contents)
        check_files(source.adapter.base, contents)
        return
    refuse_quantized(source.huggingface, config_entries(path))
    if source.shards is None:
        check_huggingface(source.huggingface)
    else:
        check_part(source.shards.parent, contents)


def config_entries(path: str | Path) -> dict[str, Any]:
    """The entries of the folder's config.json. ValueError names a damaged file."""
    file = find_model(path).huggingface / "config.json"
    refuse_pointer(file)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON, got {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is damaged: expected an object, got a {type(entries).__name__}")
    classes = entries.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file} is damaged: expected names of classes as architectures, got {classes!r}")
    return entries


def is_discriminator(path: str | Path) -> bool:
    """Whether the folder's model has a score head already: a discriminator's or a reward model's."""
    adapter, config = find_model(path).adapter, config_entries(path)
    heads = any(name.endswith("ForTokenClassification") for name in config.get("architectures") or [])
    return heads or is_reward_model(config) or (adapter is not None and adapter.scores)


def refuse_discriminator(path: str | Path) -> None:
    """ValueError for a discriminator where a language model belongs, which may miss none of its weights."""
    if is_discriminator(path):
        what = "reward model" if is_reward_model(config_entries(path)) else "discriminator"
        raise ValueError(
            f"{path} holds a {what}, and a language model is wanted here: pass a checkpoint's actor folder, or "
            "a Hugging Face folder of a language model"
        )
