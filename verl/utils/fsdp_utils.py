"""Sharding a model over all ranks with FSDP2, and getting whole tensors back out of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from verl.models.heads import AnswerModel, PolicyModel, ScoreModel
from verl.utils.model import Kind, empty_model, load_config, load_model
from verl.workers.config import FSDPConfig, ModelConfig

HEADS: dict[Kind, type[AnswerModel]] = {"policy": PolicyModel, "score": ScoreModel}


def build_sharded_model(model: ModelConfig, kind: Kind, fsdp: FSDPConfig, device: str) -> AnswerModel:
    """The model of `model.path`, sharded over all ranks with fp32 master weights; collective.

    Only rank 0 reads the weights; the others build the structure and receive their shards.
    """
    if dist.get_rank() == 0:
        hf = load_model(model.path, kind, model.override_config, model.trust_remote_code)
        weights = hf.state_dict()
    else:
        config = load_config(model.path, kind, model.override_config, model.trust_remote_code)
        hf = empty_model(config, kind, model.trust_remote_code)
        weights = {}
    if model.enable_gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    wrapper = HEADS[kind](hf, model.use_remove_padding)
    shard(wrapper, fsdp, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(hf, weights, options=options)
    # Gradient checkpointing asks for training mode; without dropout nothing else differs in it.
    return wrapper.train()


def shard(module: AnswerModel, fsdp: FSDPConfig, device: str) -> None:
    """Apply FSDP2 layer by layer; what is outside the layers (embedding, norm, head) forms the root's group."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    compute = getattr(torch, fsdp.dtype)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = set(module.hf._no_split_modules or [])
    for child in module.modules():
        if type(child).__name__ in layers:
            fully_shard(child, mesh=mesh, mp_policy=precision, reshard_after_forward=fsdp.reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=precision)


def full_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter whole, one at a time, under its Hugging Face name; collective, all ranks must exhaust it."""
    for name, parameter in module.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
