"""Child of test_merge_classic: folders as verl's classic trainer writes them, by torch's own FSDP on real ranks.

Run as a program, it forks its ranks: what takes longest is to import torch, and once is enough.
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    LocalStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.ranks import leave
from tests.tiny import causal_lm, scorer

RANKS = 4
# How a model is wrapped, which one, and on how many ranks. Widths are 32, 64 and 260; the head's bias has one element.
CASES = {
    "fsdp2-1": ("fsdp2", "policy", 1),
    "fsdp2-3": ("fsdp2", "policy", 3),
    "fsdp2-hsdp-4": ("fsdp2-hsdp", "policy", 4),
    "fsdp2-critic-3": ("fsdp2", "score", 3),
    "fsdp1-1": ("fsdp1", "untied", 1),
    "fsdp1-2": ("fsdp1", "policy", 2),
    "fsdp1-3": ("fsdp1", "untied", 3),
    "fsdp1-critic-4": ("fsdp1", "score", 4),
    "fsdp1-mesh-3": ("fsdp1-mesh", "policy", 3),
    "fsdp1-hsdp-4": ("fsdp1-hsdp", "score", 4),
    "fsdp1-local-3": ("fsdp1-local", "policy", 3),
    "fsdp1-local-untied-4": ("fsdp1-local", "untied", 4),
    "large-2": ("fsdp2", "large", 2),
}


def model(name: str) -> nn.Module:
    """One of the models, the same on every rank; `large` has 202 MB of fp32 weights, 4.2 MB in the largest tensor."""
    if name == "large":
        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 4}
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=260, num_key_value_heads=4, **sizes, tie_word_embeddings=True))
    return {"policy": causal_lm, "untied": lambda: causal_lm("llama", tied=False), "score": scorer}[name]()


def mesh(wrapped: str, world: int) -> DeviceMesh:
    """Verl's own: all ranks shard, or pairs of equal copies."""
    if wrapped.endswith("hsdp"):
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
    return init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))


def state_dict(module: nn.Module, wrapped: str, world: int) -> dict:
    """What a rank saves."""
    layers = module.model.layers
    if wrapped.startswith("fsdp2"):
        for layer in layers:
            fully_shard(layer, mesh=mesh(wrapped, world))
        return fully_shard(module, mesh=mesh(wrapped, world)).state_dict()
    options = {} if wrapped in ("fsdp1", "fsdp1-local") else {"device_mesh": mesh(wrapped, world)}
    if wrapped == "fsdp1-hsdp":
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    policy = ModuleWrapPolicy({type(layers[0])})
    module = FullyShardedDataParallel(
        module, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options
    )
    if wrapped == "fsdp1-local":
        kind, config = StateDictType.LOCAL_STATE_DICT, LocalStateDictConfig()
    else:
        kind, config = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    FullyShardedDataParallel.set_state_dict_type(module, kind, config)
    return module.state_dict()


def run(rank: int, folder: Path) -> None:
    """One rank of each case in which there are so many; the files go to `folder`/CASE."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # That FSDP1 is old.
    warnings.simplefilter("ignore")
    for case, (wrapped, name, world) in CASES.items():
        if rank >= world:
            continue
        (folder / case).mkdir(exist_ok=True)
        meeting = f"file://{folder}/{case}.rendezvous"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120)
        )
        torch.save(state_dict(model(name), wrapped, world), folder / case / f"model_world_size_{world}_rank_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=rank, world_size=RANKS)
    leave()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run, args=(Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
