"""A checkpoint's adapters into a PEFT folder, which belongs beside its base model, and checking the result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from verl.model_merger.written import Weights, name_of, refuse_overflow
from verl.models.adapter_folders import ADAPTER_WEIGHTS, AdapterFolder, find_adapter, name_in_file
from verl.models.finding import find_model, is_discriminator
from verl.models.loading import empty_model, hf_files, load_config
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.hf_files import write_hf_files
from verl.utils.checkpoint.whole import ADAPTER_CONFIG, BASE_QUANTIZATION, WEIGHTS
from verl.utils.hub import hub_origin


def write_adapters(
    local_dir: Path, target_dir: Path, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> Weights:
    """Write the adapters of the checkpoint in `local_dir`, and a discriminator's score head, to `target_dir` as PEFT
    has them, with config and tokenizer; returns what was written.

    PEFT opens it beside its base, and so does this package wherever a model is named.

    Raises:
        FileNotFoundError, ValueError: `local_dir` holds no adapters or is not whole; a weight is beyond `dtype`;
            `target_dir` holds a whole model.
    """
    adapter = _adapter_of(local_dir)
    refuse_the_other_kind(target_dir, adapter=True)
    tensors = _tensors(adapter, dtype)
    refuse_overflow(tensors.items())
    kind = "score" if is_discriminator(local_dir) else "policy"
    tokenizer = load_tokenizer(local_dir, trust_remote_code)
    with torch.device("meta"):
        model = empty_model(load_config(local_dir, kind, None, trust_remote_code), kind, trust_remote_code)
    target_dir.mkdir(parents=True, exist_ok=True)
    file = target_dir / ADAPTER_WEIGHTS
    # safetensors lets only the owner read what it writes; this has the mode of any other file.
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, {"format": "pt"})
    file.chmod(mode)
    for name in (ADAPTER_CONFIG, BASE_QUANTIZATION):
        source, target = adapter.folder / name, target_dir / name
        # What an earlier merge left there would be believed.
        target.unlink(missing_ok=True)
        if source.is_file():
            target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    write_hf_files(target_dir, model, tokenizer, dtype, hf_files(local_dir, trust_remote_code=trust_remote_code))
    return Weights(sum(tensor.numel() for tensor in tensors.values()), dtype, 1, file.stat().st_size)


def compare_adapters(local_dir: Path, test_dir: Path, dtype: torch.dtype | None = None) -> int:
    """Check that the PEFT folder `test_dir` holds exactly the checkpoint's adapters, rounded to the type that it holds;
    returns how many tensors were compared.

    Raises:
        ValueError: names the tensors that differ or are missing, or the type that is not `dtype`.
    """
    stored = adapter_dtype(test_dir)
    if dtype not in (None, stored):
        raise ValueError(f"{test_dir} holds weights in {name_of(stored)}, not in {name_of(dtype)}")
    expected, actual = _tensors(_adapter_of(local_dir), stored), load_file(test_dir / ADAPTER_WEIGHTS)
    differing = sorted(
        name for name in expected.keys() | actual.keys()
        if name not in expected or name not in actual or not torch.equal(expected[name], actual[name])
    )  # fmt: skip
    if differing:
        raise ValueError(f"{test_dir} differs from {local_dir} in {len(differing)} tensors, e.g. {differing[:3]}")
    return len(expected)


def adapter_dtype(folder: Path) -> torch.dtype:
    """The type of a PEFT folder's weights. FileNotFoundError, ValueError if it is not whole."""
    adapter = find_adapter(folder)
    adapter.check()
    return next(iter(load_file(adapter.files[0]).values())).dtype


def refuse_the_other_kind(target_dir: Path, adapter: bool) -> None:
    """ValueError if a model is to be written where an adapter lies already, or an `adapter` where a model does: nobody
    could tell afterwards which of them is meant."""
    names = WEIGHTS if adapter else (ADAPTER_CONFIG,)
    there = [name for name in names if (target_dir / name).is_file()]
    if there:
        what = "a model" if adapter else "an adapter"
        raise ValueError(f"{target_dir} holds {what} already ({there[0]}): give another --target_dir, or remove it")


def refuse_local_base(local_dir: Path) -> None:
    """ValueError if adapters are to be sent to the hub whose base is a folder of this machine."""
    base = _adapter_of(local_dir).base
    if hub_origin(base) is None:
        raise ValueError(
            f"--hf_upload_path with --adapter: the base model, {base}, is a folder of this machine, which nobody else "
            "could open: send the merged model (without --adapter), or train on a base named as on the hub"
        )


def _adapter_of(local_dir: Path) -> AdapterFolder:
    adapter = find_model(local_dir).adapter
    if adapter is None:
        raise ValueError(
            f"{local_dir} holds whole weights and no adapters: leave --adapter out, or give a checkpoint of a run with "
            "lora_rank above 0"
        )
    adapter.check()
    return adapter


def _tensors(adapter: AdapterFolder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors under their names in PEFT's files."""
    return {name_in_file(name): tensor.to(dtype).contiguous() for name, tensor in adapter.tensors().items()}
