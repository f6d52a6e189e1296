"""Folders that hold adapters and the name of their base model: PEFT's own, and a checkpoint's whose run trained some.

PEFT's          adapter_config.json, adapter_model.safetensors; config and tokenizer beside them, or the base's
a checkpoint's  adapter_config.json, model/*.safetensors in shards, huggingface/ with config and tokenizer

Where the base was in 4 bits while they were trained, base_quantization.json says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from verl.utils.checkpoint.best_link import behind_best
from verl.utils.checkpoint.file_names import MODEL_FOLDER
from verl.utils.checkpoint.whole import (
    ADAPTER_CONFIG,
    BASE_QUANTIZATION,
    HUGGINGFACE,
    WEIGHTS,
    check_part,
    refuse_pointer,
)
from verl.utils.hub import model_folder, parse_hub_name

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# PEFT's name of the only adapter, which stands in a model's names and not in files; and what files have before names.
ADAPTER, PREFIX = "default", "base_model.model."
SCORE_TASK, POLICY_TASK, REWARD_TASK = "TOKEN_CLS", "CAUSAL_LM", "SEQ_CLS"
# Of a base in 4 bits, by transformers' names (`BitsAndBytesConfig`).
FOUR_BITS = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}


@dataclass(frozen=True)
class AdapterFolder:
    """A folder of adapters, what its adapter_config.json says, and the folder of the model that they belong to."""

    folder: Path
    entries: Mapping[str, Any]
    base: str

    @property
    def is_checkpoint(self) -> bool:
        """Whether a run wrote it, in shards."""
        return (self.folder / MODEL_FOLDER).is_dir()

    @property
    def scores(self) -> bool:
        """Whether they are a discriminator's or a reward model's."""
        return self.entries.get("task_type") in (SCORE_TASK, REWARD_TASK)

    @property
    def rewards(self) -> bool:
        """Whether they are a reward model's, whose head may have another name and no bias."""
        return self.entries.get("task_type") == REWARD_TASK

    @property
    def base_dtype(self) -> str | None:
        """The type that the base's weights, in 4 bits, were made into while the adapters were trained; None if the base
        was not in 4 bits.

        Raises:
            ValueError: the file that says so is damaged, or says something else than 4 bits as they are made here.
        """
        file = self.folder / BASE_QUANTIZATION
        if not file.is_file():
            return None
        refuse_pointer(file)
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
            dtype = entries.pop("bnb_4bit_compute_dtype")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged: expected bnb_4bit_compute_dtype in an object, got {error!r}"
            ) from error
        if entries != FOUR_BITS or dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"{file}: expected {FOUR_BITS} and float32 or bfloat16 as bnb_4bit_compute_dtype, got {entries} and "
                f"{dtype!r}: merge the adapters where they were made"
            )
        return dtype

    @property
    def base_in_4bit(self) -> bool:
        """Whether the base's weights were in 4 bits while the adapters were trained (see `base_dtype`)."""
        return self.base_dtype is not None

    @property
    def huggingface(self) -> Path | None:
        """The folder of the config and tokenizer that came with the adapters; None where the base's are meant."""
        own = self.folder / HUGGINGFACE if self.is_checkpoint else self.folder
        return own if (own / "config.json").is_file() else None

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        if self.is_checkpoint:
            return sorted((self.folder / MODEL_FOLDER).glob("*.safetensors"))
        return [self.folder / ADAPTER_WEIGHTS]

    def check(self, contents: bool = True) -> None:
        """See that the folder is whole (its base not); `contents`: see `check_part`.

        Raises:
            FileNotFoundError, ValueError: names the file that is missing or damaged.
        """
        if self.is_checkpoint:
            check_part(self.folder, contents)
            return
        (file,) = self.files
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: {self.folder} has {ADAPTER_CONFIG} and no adapter in safetensors; download or "
                "save it again"
            )
        refuse_pointer(file)
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); download or copy it again") from error

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapters' tensors, whole, under the names that they have in an adapted model."""
        # Folders are looked at long before a tensor is wanted.
        from safetensors.torch import load_file

        from verl.utils.checkpoint.sharded import read_full_tensors

        if self.is_checkpoint:
            return read_full_tensors(self.folder / MODEL_FOLDER)
        return {name_in_model(name): tensor for name, tensor in load_file(self.folder / ADAPTER_WEIGHTS).items()}


def name_in_model(name: str) -> str:
    """A name of a PEFT file as the adapted model has it."""
    name = name.removeprefix(PREFIX)
    for kind in ("lora_A", "lora_B"):
        name = name.replace(f".{kind}.weight", f".{kind}.{ADAPTER}.weight")
    if name.endswith(".lora_magnitude_vector"):
        name += f".{ADAPTER}.weight"
    return name


def name_in_file(name: str) -> str:
    """A name of the adapted model as PEFT's files have it."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return PREFIX + name.replace(f".{ADAPTER}.", ".")


def find_adapter(folder: Path) -> AdapterFolder | None:
    """The adapters of a folder; None where it has none.

    Raises:
        FileNotFoundError: their base is not there.
        ValueError: adapter_config.json is damaged or names no base, or there is a whole model beside it.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    if any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}) at once, and which of them is meant cannot be "
            "told: move one of them to a folder of its own"
        )
    refuse_pointer(file)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        named = entries["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected base_model_name_or_path in an object, got {error!r}") from error
    if not isinstance(named, str) or not named:
        raise ValueError(f"{file}: expected the base model as base_model_name_or_path, got {named!r}; write it there")
    return AdapterFolder(folder, entries, _base(named, entries.get("revision"), file))


def _base(named: str, revision: str | None, file: Path) -> str:
    """The folder of the base; relative paths are of where the program runs, or of the adapter's folder."""
    for path in (Path(named).expanduser(), file.parent / named):
        if path.exists():
            path = behind_best(path.absolute())
            if path.resolve() == file.parent.resolve() or (path / ADAPTER_CONFIG).is_file():
                raise ValueError(
                    f"{file} names {path} as its base, which holds adapters itself: expected a whole model; merge that "
                    "first, and name what was merged"
                )
            return str(path)
    if parse_hub_name(named, "model") is not None:
        return model_folder(f"{named}@{revision}" if revision and "@" not in named else named)
    raise FileNotFoundError(
        f"the base model of {file.parent}, {named}, is not there: copy it there, or write where it is into {file} "
        "(base_model_name_or_path)"
    )
