"""Child of the update tests: the same updates on several ranks, gradients gathered whole."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import leave
from tests.tiny import causal_lm
from tests.workers.updates_setup import LOSSES, PROMPTS, batch, settings, update
from verl.models.answer_models import PolicyModel
from verl.models.sharding import full_parameters, shard
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.updates import MetricSums

ACTOR_SYNC = "actor_rollout_ref.actor.fsdp_config.sync_gradients_once"


def run(rank: int, world_size: int, folder: Path, device: str = "cpu") -> None:
    """One rank: every loss once, cut by tokens; rank 0 writes gradients and metrics, and the number of times that
    gradients were reduced, to `folder`. Then one loss with gradients reduced at every micro-batch, and the weights that
    an engine would get before and after a forward pass in bf16."""
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
    # Ranks get different rows and different numbers of tokens.
    share = PROMPTS // world_size
    mine = slice(share * rank, share * (rank + 1))
    for name, loss, overrides in [*((loss, loss, []) for loss in LOSSES), ("every", "gspo", [f"{ACTOR_SYNC}=False"])]:
        config = settings(loss, "tokens", overrides)
        reductions.clear()
        module, metrics = update(loss, config, batch()[mine], lambda m, c=config: _sharded(m, c, device))
        gradients = {name: parameter.grad.full_tensor().cpu() for name, parameter in module.named_parameters()}
        if rank == 0:
            result = {"gradients": gradients, "metrics": metrics, "reductions": len(reductions)}
            torch.save(result, folder / f"{name}.pt")
    _check_metrics_that_some_ranks_have()
    _check_weights_after_a_forward(mine, device)
    leave()


def _check_metrics_that_some_ranks_have() -> None:
    """Every metric is averaged over the ranks and parts that have it, by name."""
    sums, rank = MetricSums(), dist.get_rank()
    sums.add({"a": 1.0 + rank, "z": 2.0} if rank else {"a": 1.0, "b": 4.0}, 3.0 - rank)
    sums.add({"a": 7.0}, 1.0)
    ranks = dist.get_world_size()
    # On rank 0: a is 1 (of weight 3) and 7 (1), b is 4. On rank r: a is 1 + r (of weight 3 - r) and 7 (1), z is 2.
    weighed = sum((1.0 + r) * (3.0 - r) + 7.0 for r in range(ranks))
    assert sums.means() == {"a": weighed / sum(3.0 - r + 1.0 for r in range(ranks)), "b": 4.0, "z": 2.0}


def _sharded(module, config, device):
    shard(module, config.actor_rollout_ref.actor.fsdp_config, device)
    return module


def _check_weights_after_a_forward(mine: slice, device: str) -> None:
    """They are the fp32 master weights, though the forward gathered some of them in bf16."""
    config = settings("gspo", "whole", ["actor_rollout_ref.actor.fsdp_config.dtype=bfloat16"])
    module = _sharded(PolicyModel(causal_lm()), config, device)
    before = {name: tensor.clone() for name, tensor in full_parameters(module)}
    group = config.actor_rollout_ref
    DataParallelPPOActor(group.actor, group.rollout, module).compute_log_prob(batch()[mine])
    for name, tensor in full_parameters(module):
        assert torch.equal(tensor, before[name]), name


def _count_reductions() -> list[int]:
    """A list that grows by one with every reduce-scatter, which FSDP calls by a new name from torch 2.13."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    calls, original = [], getattr(dist, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    setattr(dist, name, counted)
    return calls
