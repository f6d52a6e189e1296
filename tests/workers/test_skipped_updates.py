"""Updates that are not finite: skipped on all ranks alike, counted, and never saved."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from tests.ranks import leave
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.finite import non_finite_names
from verl.workers.updates import MetricSums, optimizer_step, step_or_skip


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_names_of_what_is_not_finite(bad):
    tensors = {"a": torch.ones(3), "b": torch.tensor([0.0, bad]), "c": torch.zeros(0), "d": torch.tensor([1]),
               "e": torch.tensor([bad], dtype=torch.bfloat16)}  # fmt: skip
    assert non_finite_names(tensors) == ["b", "e"]
    assert non_finite_names({}) == []
    assert non_finite_names({"large": torch.full((4,), 3e38)}) == []


@pytest.mark.parametrize(
    ("gradient", "loss", "words"),
    [
        (math.nan, 1.0, "gradient norm nan.*1 of 2 gradients are not finite, e.g. weight"),
        (math.inf, 1.0, "gradient norm inf.*1 of 2 gradients"),
        (1.0, math.nan, "the loss is nan.*all trained weights and gradients are finite"),
        (1.0, math.inf, "the loss is inf"),
    ],
)
def test_a_skipped_update_changes_nothing_and_is_counted(gradient, loss, words, caplog):
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.weight.grad[0, 0] = gradient
    metrics = MetricSums()
    step_or_skip("actor", module, optimizer, 1.0, torch.tensor(loss), metrics)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not optimizer.state, "not even a step is counted"
    assert metrics.means() == {"actor/skipped_steps": 1}
    with pytest.raises(FloatingPointError, match=words):
        optimizer_step(module, optimizer, 1.0, torch.tensor(loss))
    assert "actor: the loss is" in caplog.text

    module.weight.grad[0, 0] = 1.0
    step_or_skip("actor", module, optimizer, 1.0, torch.tensor(0.5), metrics)
    assert metrics.means() == {"actor/skipped_steps": 1, "actor/grad_norm": pytest.approx(3**0.5)}


def test_frozen_weights_are_not_blamed():
    """What weights in 4 bits are as numbers may be nan."""
    module = layer()
    module.weight_4bit = torch.nn.Parameter(torch.tensor([math.nan]), requires_grad=False)
    for parameter in (module.weight, module.bias):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(FloatingPointError, match="all trained weights and gradients are finite"):
        optimizer_step(module, torch.optim.AdamW(module.parameters()), 1.0, torch.tensor(math.nan))


def one_rank_has_a_bad_loss(rank, path):
    """Rank 1's loss is nan and its gradients, which all share, are not: no rank steps."""
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=2)
    module = layer()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    metrics = MetricSums()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    step_or_skip("critic", module, optimizer, 1.0, math.nan if rank == 1 else 1.0, metrics)
    names = non_finite_names({"a": torch.tensor([math.inf if rank == 0 else 1.0]), "b": torch.ones(rank)})
    torch.save((module.weight.detach(), metrics.means(), names), path / f"{rank}")
    leave()


def test_the_verdict_is_the_same_on_every_rank(tmp_path):
    torch.multiprocessing.spawn(one_rank_has_a_bad_loss, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        weight, metrics, names = torch.load(tmp_path / f"{rank}")
        assert torch.equal(weight, layer().weight)
        assert metrics == {"critic/skipped_steps": 1}
        assert names == ["a"]


@pytest.mark.parametrize("where", ["weight", "exp_avg_sq of weight"])
def test_what_is_not_finite_is_not_saved(tmp_path, where):
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    broken = module.weight.data if where == "weight" else optimizer.state[module.weight]["exp_avg_sq"]
    broken[0, 1] = math.nan
    manager = FSDPCheckpointManager(module, optimizer, None, None, torch.float32)
    with pytest.raises(FloatingPointError, match=f"1 tensors of the actor are not finite, e.g. {where}, so they"):
        manager.save_checkpoint(tmp_path / "actor")
    assert list(tmp_path.iterdir()) == []
