"""Folders that hold no model to train: what they hold instead, and what to give in their place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of tokenizers of all kinds; any of them is enough for transformers to look further.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json",
)  # fmt: skip
STEP = re.compile(r"global_step_(\d+)")


def no_model(folder: Path) -> str:
    """Why `folder`, in which there is no model, is none: a sentence that ends in what to give instead."""
    if folder.is_file():
        return _a_file(folder)
    if not folder.is_dir():
        return (
            f"model folder {folder} does not exist: give a local Hugging Face or checkpoint folder; what trains takes "
            "a name of the Hugging Face hub too (ORG/NAME)"
        )
    names = sorted(file.name for file in folder.iterdir())
    if any(name.endswith(".gguf") for name in names):
        return _gguf(folder)
    steps = {int(match[1]): name for name in names if (match := STEP.fullmatch(name))}
    if steps:
        newest = folder / steps[max(steps)]
        return f"{folder} is a run's folder: give a checkpoint's actor in it, the newest is {newest / 'actor'}"
    inside = [name for name in ("actor", "critic") if (folder / name).is_dir()]
    hint = f"; did you mean {folder / inside[0]}?" if inside else ""
    got = f", got {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else ", got an empty folder"
    return (
        f"{folder} holds no model: expected config.json (Hugging Face) or huggingface/config.json and model/ (a "
        f"checkpoint's actor or critic folder){hint or got}"
    )


def _a_file(file: Path) -> str:
    if file.suffix == ".gguf":
        return _gguf(file)
    weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth")
    kind = "a file of weights" if weights else "a file"
    return f"{file} is {kind} and no model folder: give the folder with config.json, weights and tokenizer in it"


def _gguf(path: Path) -> str:
    return (
        f"{path} is GGUF, which is made for inference and cannot be trained: give the Hugging Face folder "
        "(config.json, .safetensors) that it was converted from"
    )


def refuse_quantized(folder: Path, entries: Mapping[str, Any]) -> None:
    """ValueError if a config's `entries` say that the weights are of few bits, which no gradient moves."""
    found = entries.get("quantization_config")
    if found:
        method = found.get("quant_method", "quantised") if isinstance(found, dict) else "quantised"
        raise ValueError(
            f"{folder} has quantised weights ({method}), which cannot be trained: give the model that they were made "
            "from, in bf16 or fp32 (beside adapters, load_in_4bit=True puts its weights in 4 bits as it is read)"
        )


def refuse_no_tokenizer(folder: Path) -> None:
    """FileNotFoundError if there is no file of a tokenizer in the folder; transformers may make up an empty one."""
    named = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if not (named or any(folder.glob("*.tiktoken")) or any(folder.glob("tokenization_*.py"))):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: expected tokenizer.json (or one of {', '.join(TOKENIZER_FILES[1:4])}); copy "
            "the files of the model's tokenizer there, or name their folder as tokenizer_path"
        )


@contextmanager
def told_of(folder: Path, what: str) -> Iterator[None]:
    """What transformers raises when it reads a folder's `what`, as ValueError in a sentence.

    That may be anything: tokenizers has no class of its own for a file that it does not take, and the checks of a
    config's fields have classes of huggingface_hub's.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(_told(folder, what, str(error))) from error


def _told(folder: Path, what: str, said: str) -> str:
    first = " ".join(said.split())[:200]
    if "trust_remote_code" in said:
        return (
            f"the {what} in {folder} is of code that comes with the model: read it, and set "
            "actor_rollout_ref.model.trust_remote_code=True to run it"
        )
    kind = re.search(r"model type `([^`]+)`", said)
    if kind:
        return (
            f"{folder} is a model of type {kind[1]}, which the installed transformers does not know: upgrade it, if "
            "the type is newer, or take another model"
        )
    if "model_type" in said:
        return f"{folder / 'config.json'} says no model_type: it is no Hugging Face model's, or cut short"
    return f"the {what} in {folder} cannot be read: {first}"
