"""LoRA (arXiv 2106.09685): small trained matrices beside frozen linear layers, made by the PEFT library.

A linear layer with weight W (out, in) computes W x + s B A x, with A (rank, in) and B (out, rank) trained and
s = lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732). DoRA (arXiv 2402.09353) trains the
lengths m (out,) of the rows too: m (W + s B A) / |W + s B A|, with the norm of each row.

PEFT puts its layers into the Hugging Face model, whose class stays; so packing, heads and sharding need to know nothing
of them. What is asked here: which layers, what is trained, what the merged weights are, and the model without adapters.
It is imported where it is needed alone: that takes seconds, and models without adapters do without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.config import ModelConfig
from verl.models.adapter_folders import ADAPTER, POLICY_TASK, SCORE_TASK, AdapterFolder
from verl.models.answer_models import SCORE_HEADS, score_head, score_head_name
from verl.models.four_bit import is_in_4bit, put_in_4bit, quantization_json, require_bitsandbytes, whole_weight
from verl.models.layers import decoder_layers
from verl.models.reward_models import HEADS
from verl.utils.checkpoint.whole import ADAPTER_CONFIG, BASE_QUANTIZATION
from verl.utils.hub import hub_origin

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
# Entries of adapter_config.json that are used, or say nothing of what the adapters compute.
KNOWN = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "runtime_config",
})  # fmt: skip
# How fresh adapters are drawn matters no more once they are trained, unless the base's weights were changed for it.
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")


def require_peft(why: str) -> None:
    """ModuleNotFoundError unless PEFT is installed."""
    if find_spec("peft") is None:
        raise ModuleNotFoundError(f"{why} needs the peft library, which is not installed: pip install 'verl[lora]'")


# ---------------------------------------------------------------------------------------------------------------------
# Which adapters


def adapters_of(model: ModelConfig, folder: AdapterFolder | None, key: str = "model") -> LoraConfig | None:
    """The adapters that a run with these settings trains: those of the folder that `model.path` names, or fresh ones;
    None if all weights are trained.

    Args:
        key: of the settings, for errors.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: the folder's adapters are of another kind, or the settings, which name a rank, say something else.
    """
    if folder is None and model.lora_rank == 0:
        return None
    require_peft(f"{key}.lora_rank={model.lora_rank}" if folder is None else f"{key}.path={model.path}, an adapter,")
    if folder is not None:
        config = config_in(folder)
        own = {"lora_rank": config.r} | {
            name: getattr(config, name) for name in ("lora_alpha", "use_dora", "use_rslora")
        }
        own["load_in_4bit"] = folder.base_in_4bit
        others = [
            f"{name}={getattr(model, name)}, not {value}"
            for name, value in own.items()
            if getattr(model, name) != value
        ]
        if model.lora_rank and others:
            raise ValueError(
                f"the run goes on with the adapters in {folder.folder}, which are of other settings than {key} says "
                f"({'; '.join(others)}): leave {key}.lora_rank out, and theirs count; or merge them first"
            )
        return config
    return fresh_adapters(model)


def base_in_4bit(model: ModelConfig, folder: AdapterFolder | None, key: str = "model") -> bool:
    """Whether the weights beside the adapters that a run trains (`adapters_of`) are in 4 bits: a folder's are as they
    were when its adapters were trained.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    wanted = model.load_in_4bit and model.lora_rank > 0 if folder is None else folder.base_in_4bit
    if wanted:
        require_bitsandbytes(f"{key}.load_in_4bit=True" if folder is None else f"{key}.path={model.path}, on 4 bits,")
    return wanted


def fresh_adapters(model: ModelConfig) -> LoraConfig:
    """The adapters that the settings describe, whose rank is above 0."""
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules,
        use_dora=model.use_dora,
        use_rslora=model.use_rslora,
    )


def config_in(folder: AdapterFolder) -> LoraConfig:
    """PEFT's config of a folder's adapters, without dropout.

    Raises:
        ValueError: they are something else than LoRA on linear layers; names the entry.
    """
    require_peft(f"{folder.folder}, an adapter,")
    from peft import LoraConfig

    entries, kind = dict(folder.entries), folder.entries.get("peft_type")
    plain = LoraConfig().to_dict()
    odd = {key: value for key, value in entries.items() if key not in KNOWN and value != plain.get(key) and value}
    heads = set(entries.get("modules_to_save") or ()) - set(SCORE_HEADS)
    problem = None
    if kind != "LORA":
        problem = f"peft_type={kind}: expected LORA"
    elif odd or heads:
        odd |= {"modules_to_save": sorted(heads)} if heads else {}
        named = ", ".join(f"{key}={value!r}" for key, value in sorted(odd.items()))
        problem = f"{named}, which is not supported: expected plain LoRA, rsLoRA or DoRA on linear layers"
    elif entries.get("init_lora_weights", True) not in HARMLESS_STARTS:
        problem = f"init_lora_weights={entries['init_lora_weights']!r}, which changes the base: expected plain LoRA"
    if problem:
        raise ValueError(f"the adapter in {folder.folder} has {problem}; merge it with peft, and give the whole model")
    used = (key for key in KNOWN & plain.keys() & entries.keys() if key not in ("peft_type", "modules_to_save"))
    chosen = {key: entries[key] for key in used}
    return LoraConfig(**chosen | {"lora_dropout": 0.0, "inference_mode": False, "init_lora_weights": True})


def adapters_in(hf: PreTrainedModel) -> LoraConfig | None:
    """What `add_adapters` has put into the model; None where it has not."""
    return getattr(hf, "peft_config", {}).get(ADAPTER)


def adapter_files(hf: PreTrainedModel, base: str | Path, dtype: torch.dtype) -> dict[str, str]:
    """The files that say what an adapted model's adapters are, and what they are beside, by their names; none of
    another model.

    Args:
        base: see `config_json`.
        dtype: that the model computes in.
    """
    text = config_json(hf, base)
    if text is None:
        return {}
    return {ADAPTER_CONFIG: text} | ({BASE_QUANTIZATION: quantization_json(dtype)} if is_in_4bit(hf) else {})


def config_json(hf: PreTrainedModel, base: str | Path) -> str | None:
    """adapter_config.json of an adapted model, as PEFT reads it; None of another. The score head of a discriminator is
    saved whole.

    Args:
        base: the folder of the model that the adapters belong to; one of the hub's cache is named as on the hub.
    """
    config, origin = adapters_in(hf), hub_origin(base)
    if config is None:
        return None
    head = next((name for name in SCORE_HEADS if isinstance(getattr(hf, name, None), nn.Linear)), None)
    scores = head is not None and hf.get_output_embeddings() is None
    entries = config.to_dict() | {
        "base_model_name_or_path": str(base) if origin is None else origin.where.partition("@")[0],
        "revision": None if origin is None else origin.commit,
        "inference_mode": True,
        "task_type": SCORE_TASK if scores else POLICY_TASK,
        "modules_to_save": [head] if scores else None,
    }
    return json.dumps({key: _plain(value) for key, value in sorted(entries.items())}, indent=2) + "\n"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


# ---------------------------------------------------------------------------------------------------------------------
# Into a model


def add_adapters(hf: PreTrainedModel, config: LoraConfig) -> None:
    """Put fresh adapters into a model, in place, and freeze all but them and a discriminator's score head. They are in
    fp32 and change nothing at first: B is zero.

    Raises:
        ValueError: a name among target_modules or exclude_modules fits no layer, or the layers that they fit cannot
            have adapters.
    """
    from peft import LoraConfig, LoraModel

    linear = _linear_layers(hf)
    config = LoraConfig(**_arguments(config) | {"target_modules": _targets(hf, config, linear)})
    LoraModel(hf, config, ADAPTER)
    for name, layer in adapted_layers(hf).items():
        for own, parameter in layer.named_parameters():
            if own.startswith("lora_"):
                parameter.data = parameter.data.float()
        # The weights of heads and embeddings are used as they are (`answer_models`), without what is beside them.
        if layer.base_layer is not linear.get(name):
            raise ValueError(
                f"{name} of {type(hf).__name__} cannot have an adapter: expected linear layers within decoder layers "
                f"as target_modules; {ALL_LINEAR} takes all of them"
            )
    if hf.get_output_embeddings() is None:
        score_head(hf).requires_grad_(True)


def put_base_in_4bit(hf: PreTrainedModel, dtype: torch.dtype, values: bool) -> None:
    """`put_in_4bit` of a model with fresh adapters, which change nothing of what it computes then either: DoRA's
    lengths are those of the weights in 4 bits."""
    put_in_4bit(hf, dtype, values)
    for layer in adapted_layers(hf).values() if values else ():
        if ADAPTER in layer.lora_magnitude_vector:
            lengths = torch.linalg.norm(layer.base_layer.weight, dim=1)
            layer.lora_magnitude_vector[ADAPTER].weight.data.copy_(lengths)


def _arguments(config: LoraConfig) -> dict[str, Any]:
    entries = config.to_dict()
    return {key: entries[key] for key in KNOWN & entries.keys() if key not in ("peft_type", "peft_version")}


def _targets(hf: PreTrainedModel, config: LoraConfig, linear: Mapping[str, nn.Module]) -> set[str] | str:
    """`target_modules` with names in place of all-linear; every name fits some layer."""
    endings = sorted({name.rpartition(".")[2] for name in linear})
    names = [name for name, _ in hf.named_modules()]
    if not linear:
        raise ValueError(f"{type(hf).__name__} has no linear layers within its decoder layers to have adapters")
    for key in ("target_modules", "exclude_modules"):
        wanted = getattr(config, key)
        if wanted is None or isinstance(wanted, str):
            continue
        unknown = [one for one in wanted if not any(n == one or n.endswith(f".{one}") for n in names)]
        if unknown:
            raise ValueError(
                f"{key} names {', '.join(sorted(unknown))}, and {type(hf).__name__} has no such layer: expected some "
                f"of {', '.join(endings)}, or {ALL_LINEAR}"
            )
    targets = config.target_modules
    if targets == ALL_LINEAR:
        elsewhere = any(name.rpartition(".")[2] in endings for name in names if name not in linear)
        return set(linear) if elsewhere else set(endings)
    from peft.tuners.tuners_utils import check_target_module_exists

    if not any(check_target_module_exists(config, name) for name in names):
        raise ValueError(
            f"target_modules={targets!r} and exclude_modules={config.exclude_modules!r} leave no layer of "
            f"{type(hf).__name__}: expected some of {', '.join(endings)} ({ALL_LINEAR} for all), or a regular "
            f"expression for whole names such as {next(iter(linear))}"
        )
    return targets


def _linear_layers(hf: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers within decoder layers, by their names."""
    from transformers.pytorch_utils import Conv1D

    within = {id(child) for layer in decoder_layers(hf) for child in layer.modules()}
    linear = (nn.Linear, Conv1D)
    return {name: child for name, child in hf.named_modules() if id(child) in within and isinstance(child, linear)}


def load_adapters(hf: PreTrainedModel, folder: AdapterFolder) -> None:
    """Fill the adapters of a model in place from a folder's, and a discriminator's score head with them. With a
    language model's adapters the head stays as it is.

    Raises:
        ValueError: tensors are missing, of another shape, or not the model's.
    """
    trained, tensors = {name: p for name, p in hf.named_parameters() if p.requires_grad}, folder.tensors()
    if folder.rewards and hf.get_output_embeddings() is None:
        tensors = _with_own_head(hf, tensors)
    heads = () if folder.scores else tuple(f"{name}." for name in SCORE_HEADS)
    missing = sorted(name for name in trained.keys() - tensors.keys() if not name.startswith(heads))
    foreign = sorted(tensors.keys() - trained.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(trained[name].shape)}"
        for name in sorted(trained.keys() & tensors.keys())
        if tensors[name].shape != trained[name].shape
    ]
    for names, what in ((missing, "missing"), (foreign, "have no place"), (shapes, "are of another shape")):
        if names:
            raise ValueError(
                f"the adapters in {folder.folder} do not fit {type(hf).__name__}: {len(names)} tensors {what}, e.g. "
                f"{names[0]}; was their base another model?"
            )
    with torch.no_grad():
        for name in trained.keys() & tensors.keys():
            trained[name].copy_(tensors[name])


def _with_own_head(hf: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A reward model's tensors with its head called as the model's is, and a bias of zero where it had none."""
    head = score_head_name(hf)
    tensors = {
        f"{head}.{name.partition('.')[2]}" if name.partition(".")[0] in HEADS else name: tensor
        for name, tensor in tensors.items()
    }
    bias = score_head(hf).bias
    if bias is not None and f"{head}.weight" in tensors:
        tensors.setdefault(f"{head}.bias", torch.zeros(bias.shape))
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# What an adapted model computes


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers by their names, which are those of the layers that they stand for; empty without adapters."""
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(getattr(child, "lora_A", None), nn.ModuleDict) and hasattr(child, "base_layer")
    }


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """The whole weight of the plain layer that computes what an adapted one does, in fp32; nothing is changed.
    Collective where the layer is sharded.

    Summed and scaled in fp32, whatever type the base has, of 4 bits as it computes: the formulas of this file's head.
    """
    down, up = (_whole(part[ADAPTER].weight).float() for part in (layer.lora_A, layer.lora_B))
    # Some families' layers hold their weight as (in, out).
    turned = layer.fan_in_fan_out
    weight = whole_weight(layer.base_layer).float()
    total = (weight.T if turned else weight) + layer.scaling[ADAPTER] * (up @ down)
    if ADAPTER in layer.lora_magnitude_vector:
        lengths = _whole(layer.lora_magnitude_vector[ADAPTER].weight).float()
        total = total * (lengths / torch.linalg.norm(total, dim=1)).unsqueeze(1)
    return total.T if turned else total


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def merge_adapters(hf: PreTrainedModel) -> None:
    """Replace the adapted layers of a whole model, in place, by the plain ones that compute the same. Each weight keeps
    its type, to which the sum is rounded once."""
    for name, layer in adapted_layers(hf).items():
        plain = layer.base_layer
        with torch.no_grad():
            plain.weight.copy_(merged_weight(layer))
        parent, _, own = name.rpartition(".")
        setattr(hf.get_submodule(parent), own, plain)
    hf.requires_grad_(True)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Let the module compute without its adapters within the block."""
    layers = adapted_layers(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class AsFound:
    """The model as the run found it, while its adapters are trained: the frozen reference, without a second model.

    Fresh adapters are switched off for it. Adapters that came from a folder were the model's as it was found: of them a
    copy is kept, this rank's shards, and put in place for the time. So it is with DoRA's, which leave a weight as it
    was but for the rounding of its lengths.

    Args:
        module: sharded, with the values that it starts from.
        fresh: whether the adapters are new.
    """

    def __init__(self, module: nn.Module, fresh: bool):
        self._module = module
        lengths = any(ADAPTER in layer.lora_magnitude_vector for layer in adapted_layers(module).values())
        self._first = None if fresh and not lengths else [shard.clone() for shard in self._shards()]

    def _shards(self) -> list[torch.Tensor]:
        trained = (p.detach() for p in self._module.parameters() if p.requires_grad)
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in trained]

    @contextmanager
    def back(self) -> Iterator[None]:
        """Within the block the module is as it was found; nothing of it may be gathered before or after."""
        if self._first is None:
            with without_adapters(self._module):
                yield
            return
        now = [shard.clone() for shard in self._shards()]
        _copy(self._first, self._shards())
        try:
            yield
        finally:
            _copy(now, self._shards())


def _copy(values: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    for value, place in zip(values, into, strict=True):
        place.copy_(value)
