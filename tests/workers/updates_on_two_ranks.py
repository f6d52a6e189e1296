"""Child of the update tests: the same updates on several ranks, gradients gathered whole."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.workers.updates_setup import LOSSES, PROMPTS, batch, settings, update
from verl.utils.fsdp_utils import shard


def run(rank: int, world_size: int, folder: Path, device: str = "cpu") -> None:
    """One rank: every loss once, cut by tokens; rank 0 writes gradients and metrics, and the number of times that
    gradients were reduced, to `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        device, backend = f"cuda:{rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timeout
    )
    reductions = _count_reductions()
    for loss in LOSSES:
        config = settings(loss, "tokens")
        fsdp = config.actor_rollout_ref.actor.fsdp_config

        def wrap(module, fsdp=fsdp):
            shard(module, fsdp, device)
            return module

        # Ranks get different rows and different numbers of tokens.
        share = PROMPTS // world_size
        reductions.clear()
        module, metrics = update(loss, config, batch()[share * rank : share * (rank + 1)], wrap)
        gradients = {name: parameter.grad.full_tensor().cpu() for name, parameter in module.named_parameters()}
        if rank == 0:
            result = {"gradients": gradients, "metrics": metrics, "reductions": len(reductions)}
            torch.save(result, folder / f"{loss}.pt")
    dist.destroy_process_group()


def _count_reductions() -> list[int]:
    """A list that grows by one with every reduce-scatter, which FSDP calls by a new name from torch 2.13."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    calls, original = [], getattr(dist, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    setattr(dist, name, counted)
    return calls
