"""Merging a checkpoint's `actor` or `critic` folder, or adapters and their base, into one Hugging Face folder, and
checking the result."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from verl.model_merger.adapters import compare_adapters, refuse_the_other_kind
from verl.model_merger.classic import compare_classic, find_huggingface, merge_classic
from verl.model_merger.written import name_of, open_to_readers, refuse_overflow, stored_dtype
from verl.models.finding import find_model, is_discriminator
from verl.models.loading import Kind, hf_files, load_model
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.best_link import behind_best
from verl.utils.checkpoint.file_names import is_classic
from verl.utils.checkpoint.hf_files import write_hf_files
from verl.utils.checkpoint.whole import ADAPTER_CONFIG, FSDP_CONFIG, check_huggingface, how_it_was_trained


def _checkpoint_kind(local_dir: Path, is_value_model: bool) -> Kind:
    """A critic's config names the class it was trained as."""
    source = find_model(local_dir)
    if source.shards is None and source.adapter is None:
        raise ValueError(f"{local_dir} is a Hugging Face folder already; give a checkpoint's actor or critic folder")
    if is_value_model and not is_discriminator(local_dir):
        raise ValueError(f"--is-value-model was given, but {local_dir} holds a language model")
    return "score" if is_discriminator(local_dir) else "policy"


def load_checkpoint_model(
    local_dir: str | Path,
    is_value_model: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A checkpoint's model, whole; without `dtype` in the precision it was trained to compute in."""
    local_dir = Path(local_dir)
    kind = _checkpoint_kind(local_dir, is_value_model)
    if dtype is None:
        dtype = _computed_in(local_dir / FSDP_CONFIG) if (local_dir / FSDP_CONFIG).is_file() else _of_base(local_dir)
    return load_model(local_dir, kind, trust_remote_code=trust_remote_code, dtype=dtype)


def _of_base(folder: Path) -> torch.dtype:
    """The type of the weights that an adapter of elsewhere belongs to."""
    adapter = find_model(folder).adapter
    if adapter is None:
        raise FileNotFoundError(f"{folder / FSDP_CONFIG} is missing, or no file: copy the checkpoint again")
    base = find_model(adapter.base)
    if base.shards is None:
        return stored_dtype(base.huggingface)
    return _computed_in(base.shards.parent / FSDP_CONFIG)


def _computed_in(file: Path) -> torch.dtype:
    name = how_it_was_trained(file, "dtype", str)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{file} is damaged: expected the name of a torch.dtype, got {name!r}; copy it again")
    return dtype


def merge(
    local_dir: str | Path,
    target_dir: str | Path,
    is_value_model: bool = False,
    trust_remote_code: bool = False,
    hf_model_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the checkpoint in `local_dir` to `target_dir` as safetensors with config and tokenizer.

    Weights are rounded once, from the fp32 of training to `dtype`; left out, to what training computed in. Adapters are
    added to their base in `dtype`, summed in fp32: so the engine had them, where that is what it computed in.
    A folder of verl's classic trainer (`model_world_size_W_rank_R.pt`) is merged too, with config and tokenizer of
    `hf_model_path` where it has none.

    The result opens with `AutoModelForCausalLM`, or `AutoModelForTokenClassification` for a critic; outside of this
    package, for one whose family has such a class in transformers (see `register_score_class`).

    Raises:
        FileNotFoundError, ValueError: `local_dir` is not a checkpoint's actor or critic folder, or not whole; a weight
            is beyond `dtype`.
    """
    local_dir = behind_best(Path(local_dir).expanduser())
    if is_classic(local_dir):
        huggingface = find_huggingface(local_dir, hf_model_path)
        return merge_classic(local_dir, Path(target_dir), huggingface, is_value_model, trust_remote_code, dtype)
    refuse_the_other_kind(Path(target_dir), adapter=False)
    model = load_checkpoint_model(local_dir, is_value_model, trust_remote_code, dtype)
    tokenizer = load_tokenizer(local_dir, trust_remote_code)
    base = hf_files(local_dir, trust_remote_code=trust_remote_code)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        # Written as it is: saving it through transformers would refuse settings that loading accepts.
        model.generation_config = GenerationConfig()
    # Shards have the names that transformers uses in memory, where experts lie together and others were renamed. Not
    # knowing of a conversion when it read them, it is to save under the names that such models are published with.
    model._weight_conversions = None
    refuse_overflow(model.state_dict().items())
    model.save_pretrained(target_dir)
    open_to_readers(Path(target_dir))
    if generation_config is not None:
        model.generation_config = generation_config
    write_hf_files(target_dir, model, tokenizer, model.dtype, base)
    return Path(target_dir)


def compare(
    local_dir: str | Path,
    test_hf_dir: str | Path,
    is_value_model: bool = False,
    trust_remote_code: bool = False,
    hf_model_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Check that `test_hf_dir` holds exactly the checkpoint's weights, rounded to the type that it holds, to the bit;
    returns how many tensors were compared.

    Args:
        dtype: the type that it is to hold; None: any.

    Raises:
        ValueError: names the tensors that differ or are missing, or the type that is another.
    """
    local_dir, test_hf_dir = behind_best(Path(local_dir).expanduser()), Path(test_hf_dir)
    if (test_hf_dir / ADAPTER_CONFIG).is_file():
        return compare_adapters(local_dir, test_hf_dir, dtype)
    check_huggingface(test_hf_dir)
    stored = stored_dtype(test_hf_dir)
    if dtype not in (None, stored):
        raise ValueError(f"{test_hf_dir} holds weights in {name_of(stored)}, not in {name_of(dtype)}")
    if is_classic(local_dir):
        huggingface = find_huggingface(local_dir, hf_model_path)
        return compare_classic(local_dir, test_hf_dir, huggingface, is_value_model, trust_remote_code)
    model = load_checkpoint_model(local_dir, is_value_model, trust_remote_code, stored)
    kind = _checkpoint_kind(local_dir, is_value_model)
    expected, actual = (
        model.state_dict(),
        load_model(test_hf_dir, kind, trust_remote_code=trust_remote_code, dtype=model.dtype).state_dict(),
    )
    differing = sorted(
        name for name in expected.keys() | actual.keys()
        if name not in expected or name not in actual or not torch.equal(expected[name], actual[name])
    )  # fmt: skip
    if differing:
        raise ValueError(f"{test_hf_dir} differs from {local_dir} in {len(differing)} tensors, e.g. {differing[:3]}")
    return len(expected)
