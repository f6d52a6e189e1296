"""Child of test_updates: the same updates on two ranks, gradients gathered whole."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.workers.updates_setup import LOSSES, batch, settings, update
from verl.utils.fsdp_utils import shard


def run(rank: int, world_size: int, folder: Path) -> None:
    """One rank: every loss once, cut by tokens; rank 0 writes gradients and metrics to `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timeout
    )
    for loss in LOSSES:
        config = settings(loss, "tokens")
        fsdp = config.actor_rollout_ref.actor.fsdp_config

        def wrap(module, fsdp=fsdp):
            shard(module, fsdp, "cpu")
            return module

        # Ranks get different rows and different numbers of tokens.
        module, metrics = update(loss, config, batch()[2 * rank : 2 * rank + 2], wrap)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in module.named_parameters()}
        if rank == 0:
            torch.save({"gradients": gradients, "metrics": metrics}, folder / f"{loss}.pt")
    dist.destroy_process_group()
