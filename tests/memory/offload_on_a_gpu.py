"""Child of test_offload: a sharded model trained on one GPU with and without resting in host memory."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl.memory.offload import Offloader


def train(offload: bool) -> dict:
    """A few updates in bf16 over fp32 weights; the weights, and the bytes that PyTorch holds while the model rests."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cuda", (1,))
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).cuda()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in module:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    offloader = Offloader(module, optimizer, params=offload, optimizer_states=offload)
    offloader.rest()
    x = torch.ones(4, 1024, device="cuda")
    for _ in range(3):
        with offloader.on_device(), torch.no_grad():
            module(x)
        with offloader.on_device(optimizer=True):
            module(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.empty_cache()
    # What cuBLAS keeps as its workspace is PyTorch's too, and no part of the model.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated()
    pinned = offload and offloader._params._buffer.is_pinned() and offloader._states._buffer.is_pinned()
    with offloader.on_device():
        weights = {name: value.full_tensor().cpu() for name, value in module.state_dict().items()}
    return {"weights": weights, "resting": resting, "pinned": pinned}


def run(rank: int, world_size: int, folder: Path) -> None:
    """The only rank: writes what was seen to `folder`."""
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save({"offloaded": train(offload=True), "plain": train(offload=False)}, folder / "seen.pt")
    dist.destroy_process_group()
