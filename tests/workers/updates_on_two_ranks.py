"""Child of the update tests: the same updates on several ranks, gradients gathered whole."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import leave
from tests.tiny import causal_lm, scorer
from tests.workers.updates_setup import LOSSES, PROMPTS, batch, settings, update
from verl.models.answer_models import AnswerModel, PolicyModel, ScoreModel
from verl.models.sharding import full_parameters, shard
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.updates import MetricSums, build_optimizer, optimizer_step

OLD_NAMES = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
ACTOR_SYNC = "actor_rollout_ref.actor.fsdp_config.sync_gradients_once"
AT_ONCE = "actor_rollout_ref.actor.fsdp_config.wrap_policy.min_num_params=1000000"
# Name, loss and settings of updates beside those of all losses.
MORE = [
    ("every", "gspo", [f"{ACTOR_SYNC}=False"]),
    ("every-at-once", "gspo", [f"{ACTOR_SYNC}=False", AT_ONCE]),
    *((f"{loss}-at-once", loss, [AT_ONCE]) for loss in ("sft", "gspo", "ranking", "soda")),
]


def run(rank: int, world_size: int, folder: Path, device: str = "cpu") -> None:
    """One rank: every loss once, cut by tokens; rank 0 writes gradients and metrics, and the number of times that
    weights were gathered and gradients reduced, to `folder`. Some with gradients reduced at every micro-batch or the
    model gathered at once. And the weights that an engine would get before and after a forward pass in bf16."""
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
    gathers, reductions = _count("all_gather"), _count("reduce_scatter")
    # Ranks get different rows and different numbers of tokens.
    share = PROMPTS // world_size
    mine = slice(share * rank, share * (rank + 1))
    for name, loss, overrides in [*((loss, loss, []) for loss in LOSSES), *MORE]:
        config = settings(loss, "tokens", overrides)
        gathers.clear()
        reductions.clear()
        module, metrics = update(loss, config, batch()[mine], lambda m, c=config: _sharded(m, c, device))
        gradients = {name: parameter.grad.full_tensor().cpu() for name, parameter in module.named_parameters()}
        if rank == 0:
            counts = {"gathers": len(gathers), "reductions": len(reductions)}
            torch.save({"gradients": gradients, "metrics": metrics, **counts}, folder / f"{name}.pt")
    _check_metrics_that_some_ranks_have()
    _check_weights_after_a_forward(mine, device)
    for build in (lambda: PolicyModel(causal_lm()), lambda: ScoreModel(scorer())):
        _check_steps_are_torchs(build, device)
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


def _check_steps_are_torchs(build: Callable[[], AnswerModel], device: str) -> None:
    """On distributed tensors, one of which has no gradient, and of the score head one rank has nothing: a step, and one
    whose gradients are clipped."""
    config = settings("gspo", "whole")
    ours, theirs = (_sharded(build(), config, device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optim = config.actor_rollout_ref.actor.optim
    optimizer, _ = build_optimizer(ours, optim, total_steps=1)
    options = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    expected = torch.optim.AdamW(theirs.parameters(), fused=optimizer.param_groups[0]["fused"], **options)
    for max_norm in (1e9, 0.5):
        for module in (ours, theirs):
            for number, parameter in enumerate(module.parameters(), start=1):
                parameter.grad = None if number == 2 else (parameter.detach() - max_norm).sin() * number
        gradients = [parameter.grad for parameter in theirs.parameters() if parameter.grad is not None]
        whole = torch.cat([gradient.full_tensor().flatten() for gradient in gradients])
        norm = optimizer_step(ours, optimizer, max_norm)
        assert abs(norm / whole.norm().item() - 1) < 1e-5 and norm > 1
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        expected.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            tolerance = 0 if max_norm > norm else 1e-6
            torch.testing.assert_close(mine.full_tensor(), other.full_tensor(), rtol=tolerance, atol=tolerance)
            for name, value in expected.state[other].items():
                got, value = (getattr(t, "full_tensor", lambda t=t: t)() for t in (optimizer.state[mine][name], value))
                torch.testing.assert_close(got, value, rtol=10 * tolerance, atol=tolerance)


def _count(collective: str) -> list[int]:
    """A list that grows by one with every one of FSDP's, which calls them by new names from torch 2.13."""
    name = f"{collective}_single" if hasattr(dist, f"{collective}_single") else OLD_NAMES[collective]
    calls, original = [], getattr(dist, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    setattr(dist, name, counted)
    return calls
