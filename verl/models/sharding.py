"""Sharding a model over all ranks with FSDP2, and getting whole tensors back out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.config import FSDPConfig, ModelConfig
from verl.models.adapters import (
    adapted_layers,
    adapters_of,
    add_adapters,
    base_in_4bit,
    load_adapters,
    merged_weight,
    put_base_in_4bit,
)
from verl.models.answer_models import ANSWER_MODELS, AnswerModel
from verl.models.finding import find_model
from verl.models.four_bit import PACKED, whole_weight
from verl.models.layers import compile_layers, decoder_layers, recompute_layers
from verl.models.loading import Kind, empty_model, load_config, load_model, persistent_buffers
from verl.models.proof import prove
from verl.models.sequence_parallel import own_shard
from verl.models.shared_base import drop_base, put_on_base
from verl.models.shm import model_folder
from verl.utils.run_log import phase

if TYPE_CHECKING:
    from peft import LoraConfig

Part = TypeVar("Part")
# For people.
NAMES: dict[Kind, str] = {"policy": "student", "score": "discriminator"}


def build_sharded_model(
    model: ModelConfig,
    kind: Kind,
    fsdp: FSDPConfig,
    device: str,
    frozen: bool = False,
    base: AnswerModel | None = None,
    sequence_parallel_size: int = 1,
) -> AnswerModel:
    """The model of `model.path`, sharded over all ranks; collective.

    A model to be trained has fp32 master weights; a frozen one has the type it computes in, which is what FSDP would
    make of fp32 weights before every use, and is to be run without gradients: its weights could have them, so that its
    layers run on the graphs that a trained model's passes without gradients are compiled to. Where adapters are trained
    (`trained_adapters`), everything else is frozen, and with `load_in_4bit` linear layers are in 4 bits (see
    `four_bit`).
    Only rank 0 reads the weights; the others build the structure and receive their shards.

    Args:
        base: a model, on the device, whose frozen weights this one is to compute with (see `shared_base`).
        sequence_parallel_size: successive ranks that share the tokens of their rows (see `sequence_parallel`).

    Raises:
        ValueError: the model's values are not those of its own plain forward (see `prove`).
    """
    compute, adapters = getattr(torch, fsdp.dtype), None if frozen else trained_adapters(model)
    what = f"the {'reference' if frozen else NAMES[kind]}"
    with phase(f"loading {what} from {model.path}" + ("" if base is None else ", onto the student's base")):
        hf = _read(model, kind, compute if frozen else torch.float32)
        if frozen:
            # Some classes keep a few weights in fp32, beside which FSDP takes no others that could have gradients.
            _cast_parameters(hf, compute)
        if adapters is not None:
            # DoRA's lengths are those of the weights beside them.
            _adapt(hf, model, adapters, compute, values=base is None or adapters.use_dora)
        if base is not None:
            drop_base(hf)
        own = {name: tensor for name, tensor in hf.state_dict().items() if not tensor.is_meta}
        weights = own if dist.get_rank() == 0 else {}
        if model.enable_gradient_checkpointing and not frozen:
            recompute_layers(hf, model.recompute_share)
        if fsdp.use_torch_compile:
            compile_layers(hf)
        wrapper = ANSWER_MODELS[kind](hf, model.use_remove_padding)
        wrapper.shard = own_shard(sequence_parallel_size)
        if adapters is None:
            # Some classes freeze a parameter, which reading its values undoes on rank 0 alone.
            wrapper.requires_grad_(True)
        shard(wrapper, fsdp, device)
        if base is not None:
            reshard(base)
            put_on_base(hf, base.hf)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=base is None)
        set_model_state_dict(hf, weights, options=options)
    with phase(f"comparing {what} with its plain forward"):
        prove(wrapper.eval(), compute)
        reshard(wrapper)
    return wrapper.train(not frozen)


def trained_adapters(model: ModelConfig) -> LoraConfig | None:
    """The adapters that are trained in place of the model's weights; None where these are (see `adapters_of`)."""
    return adapters_of(model, find_model(model.path).adapter)


def _read(model: ModelConfig, kind: Kind, dtype: torch.dtype) -> PreTrainedModel:
    """The model as its class builds it, of adapters their base, with its weights on rank 0; the others have the
    structure alone."""
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    if dist.get_rank() == 0:
        return load_model(model_folder(model), kind, None, model.trust_remote_code, dtype, config=config)
    return empty_model(config, kind, model.trust_remote_code, dtype)


def _cast_parameters(hf: PreTrainedModel, dtype: torch.dtype) -> None:
    for parameter in hf.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _adapt(hf: PreTrainedModel, model: ModelConfig, adapters: LoraConfig, dtype: torch.dtype, values: bool) -> None:
    """Put the adapters into a model that `_read` has read in fp32, and give what is frozen the type it computes in, or
    put it in 4 bits; `values`: whether the frozen weights will be used."""
    folder = find_model(model.path).adapter
    add_adapters(hf, adapters)
    if base_in_4bit(model, folder):
        put_base_in_4bit(hf, dtype, values and dist.get_rank() == 0)
    if folder is not None and dist.get_rank() == 0:
        load_adapters(hf, folder)
    for parameter in hf.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            # What the other ranks have is memory that nothing was written to: a copy of it would take some.
            own = parameter.data
            parameter.data = own.to(dtype) if dist.get_rank() == 0 else torch.empty_like(own, dtype=dtype)


def shard(module: AnswerModel, fsdp: FSDPConfig, device: str) -> None:
    """Apply FSDP2 layer by layer; what is outside the layers (embedding, norm, head) belongs to the root, as everything
    does of a model of few parameters. Weights in 4 bits are on every rank whole."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    compute = getattr(torch, fsdp.dtype)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = {parameter for parameter in module.parameters() if not parameter.is_floating_point()}
    for parameter in whole:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    options = {"mesh": mesh, "mp_policy": precision, "ignored_params": whole}
    gathered = sum(parameter.numel() for parameter in module.parameters() if parameter not in whole)
    for layer in decoder_layers(module.hf) if gathered >= fsdp.wrap_policy.min_num_params else ():
        fully_shard(layer, reshard_after_forward=fsdp.reshard_after_forward, **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "plain")


def with_gradient_sync(module: nn.Module, micro_batches: Sequence[Part], once: bool) -> Iterator[Part]:
    """Yield the micro-batches of one mini-batch; the caller makes a backward pass on each before it takes the next.

    Every rank must have the same number of them.

    With `once`, gradients stay whole on their rank until the last backward pass, which reduces the sum of all;
    otherwise every one reduces its own. Weights that are gathered all at once stay so until then.
    """
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for number, micro_batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        if units:
            module.set_requires_gradient_sync(not once or last)
            module.set_reshard_after_backward(len(units) > 1 or last)
        yield micro_batch


def reshard(module: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass leaves behind: FSDP2 keeps the root's for
    the backward pass that it expects, and without `reshard_after_forward` all others too."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_parameters(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every persistent buffer whole, one at a time, under its Hugging Face name; collective, all
    ranks must exhaust it.

    Adapters come merged into the weights that they are beside: summed in fp32, then cast. What is in 4 bits comes as
    the weight that it stands for. Other shards are cast to `dtype` before they are gathered (None: not cast); buffers
    are never cast. Call `reshard` first if a forward pass may have left weights gathered, which have the type that it
    computes in.
    """
    adapted = adapted_layers(module)
    for name, parameter in module.named_parameters():
        owner, _, own = name.partition(".base_layer.")
        place, _, last = name.rpartition(".")
        layer = module.get_submodule(place)
        wanted = dtype or (layer.compute_dtype if last == PACKED else parameter.dtype)
        if own in ("weight", PACKED) and owner in adapted:
            yield f"{owner}.weight", merged_weight(adapted[owner]).to(wanted)
        elif last == PACKED:
            yield f"{place}.weight", whole_weight(layer).to(wanted)
        elif not (".lora_" in name and name.partition(".lora_")[0] in adapted):
            tensor = parameter.detach().to(wanted)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield f"{owner}.{own}" if owner in adapted else name, whole
    yield from persistent_buffers(module)
