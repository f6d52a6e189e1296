"""A folder of verl's classic trainer (`verl/utils/checkpoint/classic.py`) into a Hugging Face folder, file by file.

A file of safetensors is put together and written before the next one's parts are read, so that memory holds one file
and not the model. Everything that can be wrong with names and shapes is seen before anything is written.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from verl.model_merger.written import open_to_readers, refuse_overflow
from verl.models.answer_models import SCORE_HEADS
from verl.models.finding import config_entries
from verl.models.loading import Kind, empty_model, hf_files, load_config
from verl.models.published import LAYER, checkpoint_tensors, is_converted
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.classic import RankFiles, check_rank_files, rank_files
from verl.utils.checkpoint.fsdp_checkpoint_manager import tied_names
from verl.utils.checkpoint.hf_files import write_hf_files
from verl.utils.checkpoint.whole import HUGGINGFACE, check_huggingface, weight_files

# Bytes of a file of weights. What is held in memory is one file, a copy of it and the parts that it is made of.
FILE_SIZE = 2 * 10**9
# What may stand in a folder of a model merged earlier, and would be read beside or instead of the new files.
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


@dataclass(frozen=True)
class Unit:
    """Tensors that are written together: one, or a layer's where names or layout have to be converted.

    Attributes:
        held: shape and type, without memory, under the names of the ranks' files.
        written: the same as they are published.
    """

    held: dict[str, torch.Tensor]
    written: dict[str, torch.Tensor]

    def size(self) -> int:
        """Bytes of what is written."""
        return sum(tensor.nbytes for tensor in self.written.values())


@dataclass(frozen=True)
class ClassicModel:
    """What a classic folder holds: the ranks' files, and the model's structure without memory for weights, in the types
    to be written."""

    files: list[Path]
    model: PreTrainedModel
    kind: Kind
    units: list[Unit]

    def tensors(self, units: list[Unit]) -> dict[str, torch.Tensor]:
        """The weights of these units. Files are mapped for as long as it takes."""
        ranks, found = RankFiles(self.files), {}
        for unit in units:
            held = {name: ranks.whole(name, tensor.shape, tensor.dtype) for name, tensor in unit.held.items()}
            same = unit.held.keys() == unit.written.keys()
            found |= held if same else dict(checkpoint_tensors(self.model, iter(held.items())))
        return {name: tensor.contiguous() for name, tensor in found.items()}


def find_huggingface(local_dir: Path, hf_model_path: str | Path | None) -> Path:
    """Where config and tokenizer of a classic folder are; FileNotFoundError if they are nowhere."""
    for folder in (local_dir / HUGGINGFACE, local_dir, *([] if hf_model_path is None else [Path(hf_model_path)])):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"expected config.json and the tokenizer in {local_dir / HUGGINGFACE}, got nothing: copy that folder too, or "
        "name the model that was trained with --hf_model_path"
    )


def open_classic(
    local_dir: Path, huggingface: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> ClassicModel:
    """Look at all of a classic folder before anything is made of it.

    Args:
        huggingface: where its config is.
        dtype: of the weights to be written. None: what the files hold; where that is fp32, the master weights of
            training in bf16, bf16.

    Raises:
        ValueError: files are missing or damaged, or hold another model than the config says.
    """
    files = rank_files(local_dir)
    check_rank_files(files)
    ranks = RankFiles(files)
    names = ranks.names()
    kind: Kind = "score" if any(name.partition(".")[0] in SCORE_HEADS for name in names) else "policy"
    config = load_config(huggingface, kind, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = empty_model(config, kind, trust_remote_code, dtype or _computed_in(ranks))
    again = tied_names(model)
    _check_tied(ranks, model, again & set(names))
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in again}
    units = _units(model, held, [name for name in names if name not in again], huggingface)
    for unit in units:
        for name, tensor in unit.held.items():
            ranks.parts(name, tensor.shape)
    return ClassicModel(files, model, kind, units)


def _computed_in(ranks: RankFiles) -> torch.dtype:
    found = {ranks.dtype(name) for name in ranks.names()}
    return torch.float16 if torch.float16 in found and torch.float32 not in found else torch.bfloat16


def _check_tied(ranks: RankFiles, model: PreTrainedModel, names: set[str]) -> None:
    """ValueError if a head that the config calls the embedding has values of its own."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(names):
        source = next(other for other, tensor in own.items() if other not in names and tensor is own[name])
        heads, embeddings = (ranks.parts(each, own[name].shape)[0] for each in (name, source))
        if not all(torch.equal(head, embedding) for head, embedding in zip(heads, embeddings, strict=True)):
            raise ValueError(
                f"the config says tie_word_embeddings, and {name} in {ranks.files[0].parent} differs from {source}: "
                "say false there to keep it"
            )


def _units(model: PreTrainedModel, held: dict[str, torch.Tensor], names: list[str], huggingface: Path) -> list[Unit]:
    """What is written together, in the model's order. The files have the model's names in memory or, from an older
    transformers, those that it is published with."""
    written = dict(checkpoint_tensors(model, iter(held.items())))
    if set(names) == held.keys() and is_converted(model):
        groups = itertools.groupby(held, key=lambda name: LAYER.match(name).group())
        parts = [{name: held[name] for name in group} for _, group in groups]
        return [Unit(part, dict(checkpoint_tensors(model, iter(part.items())))) for part in parts]
    if set(names) != written.keys():
        known = held if len(held.keys() - set(names)) < len(written.keys() - set(names)) else written
        missing, foreign = sorted(known.keys() - set(names)), sorted(set(names) - known.keys())
        raise ValueError(
            f"expected the {len(known)} tensors of {type(model).__name__}, which {huggingface / 'config.json'} "
            f"describes, got {len(names)} (missing: {missing[:3]}, foreign: {foreign[:3]}): give the config of the "
            "model that was trained; adapters and other heads are not merged"
        )
    return [Unit({name: tensor}, {name: tensor}) for name, tensor in written.items()]


def merge_classic(
    local_dir: Path,
    target_dir: Path,
    huggingface: Path,
    is_value_model: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    file_size: int = FILE_SIZE,
) -> Path:
    """Write the model of a classic folder to `target_dir` as safetensors, with the config and tokenizer in
    `huggingface`.

    Raises:
        ValueError: see `open_classic`; nothing has been written then.
    """
    if target_dir.resolve() == huggingface.resolve() and not huggingface.is_relative_to(local_dir):
        raise ValueError(
            f"--target_dir {target_dir} is the model that --hf_model_path names, whose weights would go: expected "
            "another folder"
        )
    classic = open_classic(local_dir, huggingface, dtype, trust_remote_code)
    _insist(classic, is_value_model)
    tokenizer = load_tokenizer(huggingface, trust_remote_code)
    base = hf_files(huggingface, trust_remote_code=trust_remote_code)
    target_dir.mkdir(parents=True, exist_ok=True)
    for file in target_dir.iterdir():
        if WEIGHTS.fullmatch(file.name):
            file.unlink()
    _write_weights(classic, target_dir, file_size)
    open_to_readers(target_dir)
    write_hf_files(target_dir, classic.model, tokenizer, classic.model.dtype, base)
    return target_dir


def _insist(classic: ClassicModel, is_value_model: bool) -> None:
    if is_value_model and classic.kind != "score":
        raise ValueError(f"--is-value-model was given, but {classic.files[0].parent} holds a language model")


def _write_weights(classic: ClassicModel, target_dir: Path, file_size: int) -> None:
    """The index comes last: without it, what an interrupted merger leaves is no model."""
    files = _split(classic.units, file_size)
    places = {}
    for number, units in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = classic.tensors(units)
        refuse_overflow(tensors.items())
        save_file(tensors, target_dir / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(unit.size() for unit in classic.units)}, "weight_map": places}
        (target_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(units: list[Unit], file_size: int) -> list[list[Unit]]:
    """The units of each file, in order; a larger one has a file of its own."""
    files: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not files or unit.size() > room:
            files.append([])
            room = file_size
        files[-1].append(unit)
        room -= unit.size()
    return files


def compare_classic(
    local_dir: Path, test_hf_dir: Path, huggingface: Path, is_value_model: bool = False, trust_remote_code: bool = False
) -> int:
    """Check that `test_hf_dir` holds the folder's weights, in the precision that it has; returns how many tensors were
    compared.

    Raises:
        ValueError: names the tensors that differ or are missing.
    """
    check_huggingface(test_hf_dir)
    entries = config_entries(test_hf_dir)
    dtype = getattr(torch, entries.get("dtype") or entries.get("torch_dtype") or "float32")
    places = {name: file for file in weight_files(test_hf_dir) for name in _names(file)}
    classic = open_classic(local_dir, huggingface, dtype, trust_remote_code)
    _insist(classic, is_value_model)
    names = {name for unit in classic.units for name in unit.written}
    differing = names ^ places.keys()
    for units in _split(classic.units, FILE_SIZE):
        for name, tensor in classic.tensors(units).items():
            if name in places and not torch.equal(_tensor(places[name], name), tensor):
                differing.add(name)
    if differing:
        found = sorted(differing)
        raise ValueError(f"{test_hf_dir} differs from {local_dir} in {len(found)} tensors, e.g. {found[:3]}")
    return len(names)


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        raise ValueError(f"expected safetensors in {file.parent}, got {file.name}: merge the checkpoint again")
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)
