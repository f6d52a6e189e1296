"""One model's part of a checkpoint: weights, optimizer, schedule, and the Hugging Face files beside them.

    FOLDER/model/*.safetensors        weights, sharded
    FOLDER/optim/*.safetensors        AdamW's tensors, sharded
    FOLDER/extra_state.json           optimizer scalars and the learning-rate schedule
    FOLDER/fsdp_config.json           how it was written
    FOLDER/huggingface/               config and tokenizer
    FOLDER/adapter_config.json        where adapters are trained: what they are, and the folder of their base
    FOLDER/base_quantization.json     where the base is in 4 bits: how

Of a model that is frozen but for some parameters (adapters, a score head) these alone are written and read.

Any number of ranks can load what any other number wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl.utils.background import Background
from verl.utils.checkpoint.checksums import sync_to_disk
from verl.utils.checkpoint.file_names import MODEL_FOLDER, OPTIM_FOLDER
from verl.utils.checkpoint.hf_files import HuggingFaceFiles, write_hf_files
from verl.utils.checkpoint.sharded import (
    HostShards,
    Shard,
    check_all_are_seen,
    own_shard,
    read_layout,
    read_sharded,
    write_sharded,
)
from verl.utils.checkpoint.whole import ADAPTER_CONFIG, BASE_QUANTIZATION, FSDP_CONFIG, HUGGINGFACE
from verl.utils.finite import non_finite_names

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# Entries of adapter_config.json that say how much adapters count, and what is beside them.
SCALE = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "load_in_4bit")
# Optimizer settings that come from the configuration, not from the checkpoint.
CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps")


class FSDPCheckpointManager:
    """The part of a checkpoint that is one FSDP2-wrapped Hugging Face model with its optimizer, saved and loaded.

    Args:
        base: the files of the folder that the model came from, read at the start: the folder may be gone when a
            checkpoint is written.
        adapter_files: texts of files by their names, where adapters are trained: adapter_config.json, and
            base_quantization.json if their base is in 4 bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype,
        base: HuggingFaceFiles | None = None,
        adapter_files: Mapping[str, str] | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.base = base
        self.adapter_files = adapter_files or {}
        self._host = HostShards()
        self._writing: Background | None = None

    def size(self) -> int:
        """Bytes that `save_checkpoint` writes, small files left out. Asks for no state dict: what it counts may be in
        host memory."""
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*trained, *(value for value in states if isinstance(value, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write everything into `folder`; collective over all ranks.

        Raises:
            FloatingPointError: weights or optimizer are not finite; nothing is written.
        """
        folder = Path(folder)
        self._refuse_non_finite(folder)
        write_sharded(self._weights(), folder / MODEL_FOLDER)
        tensors, scalars = self._optimizer_state()
        write_sharded(tensors, folder / OPTIM_FOLDER)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._write_scalars(folder, scalars)
            self._write_hf_files(folder)
            check_all_are_seen(folder)

    def reserve(self) -> None:
        """Take the host memory that `begin_checkpoint` copies into, which then need not wait for it; collective."""
        self._copy_to_host()

    def begin_checkpoint(self, folder: str | Path) -> None:
        """Copy everything to host memory, and begin to write it into `folder` in the background; collective, the
        writing not. It holds what the model is now, whatever comes after. `is_written` says when it is done.

        Raises:
            FloatingPointError: weights or optimizer are not finite; nothing is written.
        """
        folder = Path(folder)
        if self._writing is not None:
            self._writing.wait()
        self._refuse_non_finite(folder)
        shards, scalars = self._copy_to_host()
        for name in shards:
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._write_scalars(folder, scalars)
        self._writing = Background(partial(self._write_copies, shards, folder), f"writing {folder}")

    def is_written(self) -> bool:
        """Whether this rank has written its part of what was begun last, if anything was. Raises what kept it."""
        if self._writing is not None and not self._writing.at_work:
            done, self._writing = self._writing, None
            done.wait()
        return self._writing is None

    def _copy_to_host(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """This rank's shards by their folder, and the optimizer's scalars."""
        tensors, scalars = self._optimizer_state()
        shards = {MODEL_FOLDER: own_shard(self._weights()), OPTIM_FOLDER: own_shard(tensors)}
        return self._host.copy(shards), scalars

    def _refuse_non_finite(self, folder: Path) -> None:
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        states = {
            f"{key} of {name}": value
            for name, parameter in named.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if key != "step"
        }
        if broken := non_finite_names(named | states):
            raise FloatingPointError(
                f"{len(broken)} tensors of the {folder.name} are not finite, e.g. {broken[0]}, so they are not "
                "saved: lower its learning rate, and go on from an earlier checkpoint"
            )

    def load_checkpoint(self, folder: str | Path) -> None:
        """Restore everything from `folder`; collective over all ranks.

        Raises:
            ValueError: it holds other tensors than are trained here, of other shapes, or adapters of another scale.
        """
        folder = Path(folder)
        self._refuse_others(folder)
        self._refuse_another_scale(folder)
        read_sharded(self._weights(), folder / MODEL_FOLDER)
        extra = json.loads((folder / "extra_state.json").read_text())
        tensors, _ = self._optimizer_state()
        configured = [{key: group[key] for key in CONFIGURED} for group in self.optimizer.param_groups]
        read_sharded(tensors, folder / OPTIM_FOLDER)
        set_optimizer_state_dict(self.model, self.optimizer, {**tensors, **extra["optimizer"]}, options=FLAT)
        self.lr_scheduler.load_state_dict(extra["lr_scheduler"])
        self._reconfigure(configured)

    def _refuse_others(self, folder: Path) -> None:
        there, wanted = read_layout(folder / MODEL_FOLDER), self._weights()
        other = sorted(
            name
            for name in there.keys() | wanted.keys()
            if name not in there or name not in wanted or there[name].size != wanted[name].shape
        )
        if other:
            got = there[other[0]].size if other[0] in there else "nothing"
            expected = wanted[other[0]].shape if other[0] in wanted else "nothing"
            raise ValueError(
                f"{folder} is of another model, or of other adapters: it differs in {len(other)} tensors, e.g. "
                f"{other[0]} (expected {_sizes(expected)}, got {_sizes(got)}); resume with the model, lora_rank, "
                "target_modules and use_dora that it was trained with"
            )

    def _refuse_another_scale(self, folder: Path) -> None:
        """What adapters compute depends on settings that no shape tells of."""
        file = folder / ADAPTER_CONFIG
        if ADAPTER_CONFIG not in self.adapter_files or not file.is_file():
            return
        there, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(self.adapter_files[ADAPTER_CONFIG])
        there["load_in_4bit"] = (folder / BASE_QUANTIZATION).is_file()
        wanted["load_in_4bit"] = BASE_QUANTIZATION in self.adapter_files
        other = [f"{key}={wanted.get(key)}, not {there.get(key)}" for key in SCALE if there.get(key) != wanted.get(key)]
        if other:
            raise ValueError(
                f"{folder} has adapters of other settings than this run's ({'; '.join(other)}): resume with those of "
                "the checkpoint"
            )

    def _reconfigure(self, configured: list[dict[str, Any]]) -> None:
        """Today's settings win over the checkpoint's: a run may be resumed with another learning rate."""
        schedule = self.lr_scheduler
        for number, (group, settings) in enumerate(zip(self.optimizer.param_groups, configured, strict=True)):
            group.update(settings)
            schedule.base_lrs[number] = settings["initial_lr"]
            group["lr"] = settings["initial_lr"] * schedule.lr_lambdas[number](schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors, sharing memory with it; a tied LM head is the embedding and is not written twice. Where
        there are frozen ones, the others."""
        again = tied_names(self.model)
        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in again and (name in trained or not frozen)
        }

    def _optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        state = get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return tensors, {key: value for key, value in state.items() if key not in tensors}

    def _write_copies(self, shards: Mapping[str, Shard], folder: Path) -> None:
        for name, shard in shards.items():
            shard.write(folder / name)
            if shard.chunks:
                sync_to_disk(folder / name / shard.file)
        if not dist.is_initialized() or dist.get_rank() == 0:
            # Training does not change them, and a large tokenizer takes seconds.
            self._write_hf_files(folder)

    def _write_scalars(self, folder: Path, scalars: dict[str, Any]) -> None:
        extra = {"optimizer": scalars, "lr_scheduler": self.lr_scheduler.state_dict()}
        (folder / "extra_state.json").write_text(json.dumps(extra, indent=1))
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        how = {"FSDP_version": 2, "world_size": world_size, "dtype": str(self.compute_dtype).removeprefix("torch.")}
        (folder / FSDP_CONFIG).write_text(json.dumps(how, indent=1))
        for name, text in self.adapter_files.items():
            (folder / name).write_text(text, encoding="utf-8")

    def _write_hf_files(self, folder: Path) -> None:
        write_hf_files(folder / HUGGINGFACE, self.model, self.tokenizer, self.compute_dtype, self.base)


def _sizes(shape: torch.Size | str) -> str:
    return shape if isinstance(shape, str) else str(tuple(shape))


def tied_names(model: nn.Module) -> set[str]:
    """Names in the state dict under which a parameter stands once more: an LM head that is the embedding."""
    names = dict(model.named_parameters(remove_duplicate=False))
    sources = set(getattr(model, "all_tied_weights_keys", {}).values())
    kept: dict[int, str] = {}
    for name in sorted(names, key=lambda name: name not in sources):
        kept.setdefault(id(names[name]), name)
    return {name for name, parameter in names.items() if kept[id(parameter)] != name}
