"""Child of test_offload: a sharded model trained on two ranks with and without resting in host memory."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from tests.ranks import leave
from tests.tiny import answer_rows, causal_lm
from verl.memory.offload import Offloader
from verl.models.answer_models import PolicyModel
from verl.models.sharding import full_parameters, shard
from verl.trainer.config import compose_config

STEPS = 3


def build(reshard: bool) -> tuple[PolicyModel, torch.optim.Optimizer]:
    """A tiny policy with a tied head, sharded, and its optimizer."""
    flag = f"actor_rollout_ref.actor.fsdp_config.reshard_after_forward={reshard}"
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    module = PolicyModel(causal_lm(tied=True))
    shard(module, compose_config([*required, flag]).actor_rollout_ref.actor.fsdp_config, "cpu")
    return module, torch.optim.AdamW(module.parameters(), lr=1e-2)


def step(module: PolicyModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One update on rows of this rank's own."""
    log_probs, _ = module(answer_rows([3 + number, 5], [4, 2 + dist.get_rank()]))
    (-log_probs.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


class Watch:
    """The memory behind a model's shards, as they were when it was sharded, and behind its optimizer's states."""

    def __init__(self, module: PolicyModel, optimizer: torch.optim.Optimizer):
        self.shards = [parameter.to_local().untyped_storage() for parameter in module.parameters()]
        self.module = module
        self.optimizer = optimizer

    def sizes(self) -> dict[str, int]:
        """Bytes in use; `whole` is of parameters that are not sharded at present."""
        states = [v.to_local() if isinstance(v, DTensor) else v for v in self._states()]
        whole = [p for p in self.module.parameters() if not isinstance(p, DTensor)]
        return {
            "params": sum(shard.nbytes() for shard in self.shards),
            "states": sum(state.untyped_storage().nbytes() for state in states),
            "whole": sum(parameter.untyped_storage().nbytes() for parameter in whole),
        }

    def same_shards(self) -> bool:
        """Whether the parameters still live in the memory they were sharded into."""
        now = [parameter.to_local().untyped_storage()._cdata for parameter in self.module.parameters()]
        return now == [shard._cdata for shard in self.shards]

    def _states(self) -> list[torch.Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values()]


def train(reshard: bool, params: bool, states: bool) -> dict:
    """A few updates, each after a forward without gradients, resting in between; what was seen on the way."""
    module, optimizer = build(reshard)
    watch = Watch(module, optimizer)
    offloader = Offloader(module, optimizer, params, states)
    offloader.rest()
    seen = {"resting": [watch.sizes()], "inside": [], "log_probs": []}
    for number in range(STEPS):
        with offloader.on_device(), torch.no_grad():
            # Without reshard_after_forward this leaves every layer whole.
            seen["log_probs"].append(module(answer_rows([4, 6], [3, 2]))[0])
        seen["resting"].append(watch.sizes())
        with offloader.on_device(optimizer=True):
            with offloader.on_device():
                step(module, optimizer, number)
            seen["inside"].append(watch.sizes())
            seen["same_shards"] = watch.same_shards()
        seen["resting"].append(watch.sizes())
    with offloader.on_device(optimizer=True):
        seen["weights"] = {name: tensor.clone() for name, tensor in full_parameters(module)}
        flat = get_optimizer_state_dict(module, optimizer)["state"]
        seen["states"] = {f"{name}.{key}": whole(value) for name, state in flat.items() for key, value in state.items()}
        seen["state_dict"] = {name: whole(value) for name, value in module.state_dict().items()}
    return seen


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def run(rank: int, world_size: int, folder: Path) -> None:
    """One rank: every combination of flags; rank 0 writes what was seen to `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    seen = {
        (reshard, params, states): train(reshard, params, states)
        for reshard in (True, False)
        for params, states in ((False, False), (True, True), (True, False), (False, True))
    }
    if rank == 0:
        torch.save(seen, folder / "seen.pt")
    leave()
