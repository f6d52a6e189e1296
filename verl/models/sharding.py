"""Sharding a model over all ranks with FSDP2, and getting whole tensors back out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

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
from verl.models.answer_models import ANSWER_MODELS, AnswerModel
from verl.models.layers import compile_layers, decoder_layers, recompute_layers
from verl.models.loading import Kind, empty_model, load_config, load_model, persistent_buffers
from verl.models.proof import prove
from verl.models.shm import model_folder
from verl.utils.run_log import phase

Part = TypeVar("Part")
# For people.
NAMES: dict[Kind, str] = {"policy": "student", "score": "discriminator"}


def build_sharded_model(
    model: ModelConfig, kind: Kind, fsdp: FSDPConfig, device: str, frozen: bool = False
) -> AnswerModel:
    """The model of `model.path`, sharded over all ranks; collective.

    A model to be trained has fp32 master weights; a frozen one has the type it computes in, which is what FSDP would
    make of fp32 weights before every use. Only rank 0 reads the weights; the others build the structure and receive
    their shards.

    Raises:
        ValueError: the model's values are not those of its own plain forward (see `prove`).
    """
    dtype = getattr(torch, fsdp.dtype) if frozen else torch.float32
    what = f"the {'reference' if frozen else NAMES[kind]}"
    with phase(f"loading {what} from {model.path}"):
        hf, weights = _read(model, kind, dtype)
        if model.enable_gradient_checkpointing and not frozen:
            recompute_layers(hf, model.recompute_share)
        if fsdp.use_torch_compile:
            compile_layers(hf)
        wrapper = ANSWER_MODELS[kind](hf, model.use_remove_padding).requires_grad_(not frozen)
        shard(wrapper, fsdp, device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(hf, weights, options=options)
    with phase(f"comparing {what} with its plain forward"):
        prove(wrapper.eval(), getattr(torch, fsdp.dtype))
        reshard(wrapper)
    return wrapper.train(not frozen)


def _read(model: ModelConfig, kind: Kind, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model as its class builds it, and its weights on rank 0; the others have the structure alone."""
    if dist.get_rank() == 0:
        hf = load_model(model_folder(model), kind, model.override_config, model.trust_remote_code, dtype)
        return hf, hf.state_dict()
    config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
    return empty_model(config, kind, model.trust_remote_code, dtype), {}


def shard(module: AnswerModel, fsdp: FSDPConfig, device: str) -> None:
    """Apply FSDP2 layer by layer; what is outside the layers (embedding, norm, head) belongs to the root."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    compute = getattr(torch, fsdp.dtype)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(module.hf):
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=fsdp.reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(module, "plain")


def with_gradient_sync(module: nn.Module, micro_batches: Sequence[Part], once: bool) -> Iterator[Part]:
    """Yield the micro-batches of one mini-batch; the caller makes a backward pass on each before it takes the next.

    Every rank must have the same number of them.

    With `once`, gradients stay whole on their rank until the last backward pass, which reduces the sum of all;
    otherwise every one reduces its own.
    """
    for number, micro_batch in enumerate(micro_batches, start=1):
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not once or number == len(micro_batches))
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

    Shards are cast to `dtype` before they are gathered (None: not cast); buffers are never cast. Call `reshard` first
    if a forward pass may have left weights gathered, which have the type that it computes in.
    """
    for name, parameter in module.named_parameters():
        tensor = parameter.detach().to(dtype or parameter.dtype)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    yield from persistent_buffers(module)
