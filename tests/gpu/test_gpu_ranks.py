"""Over NCCL on as many GPUs as there are: updates with the gradients and metrics of one process on the CPU, and weights
to processes of another group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch

from tests.workers import updates_on_two_ranks
from tests.workers.updates_setup import LOSSES, batch, settings, update
from verl.workers.rollout.weight_line import SENDER, WeightLine


@pytest.mark.several_gpus
@pytest.mark.parametrize("ranks", [2, 4])
def test_fp32_updates_over_nccl_are_those_of_one_process(ranks, tmp_path):
    """Every rank has other rows, other numbers of tokens and so other micro-batches to fill; none waits for ever."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    torch.multiprocessing.spawn(updates_on_two_ranks.run, args=(ranks, tmp_path, "cuda"), nprocs=ranks)
    for loss in LOSSES:
        module, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                result["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (loss, name)
        assert result["reductions"] == 3, loss


@pytest.mark.several_gpus
def test_weights_arrive_over_nccl():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(end_of_the_line, args=(port,), nprocs=2)


def end_of_the_line(place: int, port: int) -> None:
    """The process that sends, or one that receives and compares; three pushes."""
    torch.cuda.set_device(place)
    line = WeightLine("127.0.0.1", port, place, 2, f"cuda:{place}", timedelta(seconds=120))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            "matrix": torch.randn(1536, 8960, generator=generator).bfloat16(),
            "turned": torch.randn(40, 60, generator=generator).T,
            "number": torch.randn((), generator=generator),
            "none": torch.empty(0, 3),
            "count": torch.tensor([seed, 2**40]),
        }
        if place == SENDER:
            line.send((name, tensor.to(f"cuda:{place}")) for name, tensor in weights.items())
        else:
            received = {name: tensor.cpu() for name, tensor in line.receive()}
            assert list(received) == list(weights)
            for name, tensor in weights.items():
                assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor), (seed, name)
    torch.cuda.synchronize()
    # The other end may be there no more when Python would take the group down.
    os._exit(0)
