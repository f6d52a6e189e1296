"""Child of the update tests of recent families: the same updates on two ranks, gradients gathered whole."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import leave
from tests.recent_families import recent, recent_scorer
from tests.workers import updates_setup
from tests.workers.updates_setup import PROMPTS, batch, settings, update
from verl.models.layers import recompute_layers
from verl.models.sharding import shard


def run(rank: int, world_size: int, family: str, losses: list[str], folder: Path) -> None:
    """One rank: every loss once, cut by tokens, with every other layer recomputed; rank 0 writes gradients and metrics
    to `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    updates_setup.causal_lm, updates_setup.scorer = partial(recent, family), partial(recent_scorer, family)
    share = PROMPTS // world_size
    mine = slice(share * rank, share * (rank + 1))
    for loss in losses:
        config = settings(loss, "tokens")

        def sharded(module, fsdp=config.actor_rollout_ref.actor.fsdp_config):
            recompute_layers(module.hf, 0.5)
            shard(module, fsdp, "cpu")
            return module

        module, metrics = update(loss, config, batch()[mine], sharded)
        gradients = {
            name: parameter.grad.full_tensor()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        if rank == 0:
            torch.save({"gradients": gradients, "metrics": metrics}, folder / f"{loss}.pt")
    leave()
