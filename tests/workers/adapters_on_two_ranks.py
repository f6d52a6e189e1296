"""Child of test_adapter_updates: adapted models sharded over two ranks, built as workers build them."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.ranks import leave
from tests.workers.adapters_setup import adapted_update
from tests.workers.updates_setup import PROMPTS, batch, settings
from verl.config.engine import WrapPolicy
from verl.models.four_bit import linear_layers, round_to_4bit, whole_weight
from verl.models.loading import load_model
from verl.models.sharding import build_sharded_model, full_parameters, shard

LOSSES, KINDS = ("sft", "gspo", "bradley_terry"), ("lora", "dora", "4bit")
# Of gathering weights.
WAYS = {"by-layers": [], "at-once": ["actor_rollout_ref.actor.fsdp_config.wrap_policy.min_num_params=1000000"]}


def run(rank: int, world_size: int, folder: Path) -> None:
    """One rank: rank 0 writes gradients and metrics of each loss to `folder`; then what `build_sharded_model` makes of
    the folders `base`, `adapter` and `critic` in it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timeout
    )
    share = PROMPTS // world_size
    mine = slice(share * rank, share * (rank + 1))
    for loss in LOSSES:
        for kind in KINDS:
            for way, overrides in WAYS.items():
                config = settings(loss, "tokens", overrides)
                result = adapted_update(loss, config, batch()[mine], kind, lambda m, c=config: _sharded(m, c))
                if rank == 0:
                    torch.save(result, folder / f"{loss}-{kind}-{way}.pt")
    _check_what_is_built(folder)
    _check_what_is_built_in_4bit(folder)
    _check_what_is_few_in_4bit(folder)
    leave()


def _sharded(module, config):
    shard(module, config.actor_rollout_ref.actor.fsdp_config, "cpu")
    return module


def _check_what_is_built(folder: Path) -> None:
    """Frozen weights are in the type that is computed in and adapters in fp32; merged, they are what the folder's
    merged model has; a fresh adapter leaves the base as it is."""
    group = settings("gspo").actor_rollout_ref
    for name, rank in (("adapter", 0), ("base", 3)):
        for dtype in (torch.float32, torch.bfloat16):
            fsdp = replace(group.actor.fsdp_config, dtype=str(dtype).removeprefix("torch."))
            model = replace(group.model, path=str(folder / name), lora_rank=rank)
            module = build_sharded_model(model, "policy", fsdp, "cpu")
            for key, parameter in module.hf.named_parameters():
                trained = ".lora_" in key
                assert parameter.requires_grad == trained and parameter.dtype == (
                    torch.float32 if trained else dtype
                ), key
            expected = dict(load_model(folder / name, "policy", dtype=dtype).named_parameters())
            pushed = dict(full_parameters(module.hf, dtype))
            assert pushed.keys() == expected.keys()
            for key, tensor in pushed.items():
                torch.testing.assert_close(
                    tensor, expected[key], atol=1e-6, rtol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
    critic = replace(settings("gspo").critic.model, path=str(folder / "adapter"))
    module = build_sharded_model(critic, "score", critic.fsdp_config, "cpu")
    own = {key for key, parameter in module.hf.named_parameters() if parameter.requires_grad and ".lora_" not in key}
    assert own == {"score.weight", "score.bias"}


def _check_what_is_built_in_4bit(folder: Path) -> None:
    """Every linear layer is in 4 bits, with an adapter or without; an engine gets the rounded weights of the base, and
    DoRA's lengths are theirs."""
    group = settings("gspo").actor_rollout_ref
    adapters = {"path": str(folder / "base"), "lora_rank": 3, "load_in_4bit": True, "target_modules": ["q_proj"]}
    for dtype in (torch.float32, torch.bfloat16):
        fsdp = replace(group.actor.fsdp_config, dtype=str(dtype).removeprefix("torch."))
        model = replace(group.model, **adapters, use_dora=dtype == torch.float32)
        module = build_sharded_model(model, "policy", fsdp, "cpu")
        packed = {name: parameter for name, parameter in module.hf.named_parameters() if "weight_4bit" in name}
        # FSDP's copies on GPUs would not keep every bit of them.
        assert len(packed) == 2 * 7 and not any(isinstance(parameter, DTensor) for parameter in packed.values())
        rounded = load_model(folder / "base", "policy")
        round_to_4bit(rounded, dtype)
        for name, plain in linear_layers(rounded).items():
            layer = module.hf.get_submodule(name)
            assert torch.equal(whole_weight(getattr(layer, "base_layer", layer)), plain.weight.to(dtype)), name
        expected = dict(rounded.to(dtype).named_parameters())
        pushed = dict(full_parameters(module.hf, dtype))
        assert pushed.keys() == expected.keys()
        for key, tensor in pushed.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def _check_what_is_few_in_4bit(folder: Path) -> None:
    """What is gathered is counted: of two layers, embedding, norms, biases and adapters of rank 3."""
    few = 260 * 32 + 2 * (2 * 32 + 32 + 16 + 16) + 32 + 2 * 3 * (32 + 32)
    group = settings("gspo").actor_rollout_ref
    adapters = {"lora_rank": 3, "load_in_4bit": True, "target_modules": ["q_proj"]}
    model = replace(group.model, path=str(folder / "base"), **adapters)
    for limit, units in ((few, 3), (few + 1, 1)):
        fsdp = replace(group.actor.fsdp_config, wrap_policy=WrapPolicy(min_num_params=limit))
        module = build_sharded_model(model, "policy", fsdp, "cpu")
        assert sum(isinstance(part, FSDPModule) for part in module.modules()) == units, (limit, units)
