"""Weights between processes that share no process group, here threads: every tensor arrives as it was sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from verl.utils.rendezvous import reserve_port
from verl.workers.rollout.weight_line import SENDER, WeightLine

HOST, RECEIVERS = "127.0.0.1", 2
TIMEOUT = timedelta(seconds=60)


class MeetsAsNCCL:
    """A gloo group whose processes meet as NCCL's do, at their first collective: rank 0 sets "0" in the store that it
    was given to an identifier of 128 bytes, which the others get there (`broadcastUniqueNCCLID`)."""

    gloo = dist.ProcessGroupGloo

    def __init__(self, store, rank, size, timeout):
        self.store, self.rank, self.met = store, rank, False
        self.group = self.gloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def broadcast(self, tensor, root):
        if not self.met and self.rank == 0:
            self.store.set("0", b"\x00" * 128)
        elif not self.met:
            assert len(self.store.get("0")) == 128, "Invalid size for ncclUniqueId"
        self.met = True
        return self.group.broadcast(tensor, root)


@pytest.fixture(params=["gloo", "as NCCL"])
def ends(request, monkeypatch):
    """The sender and the receivers, each to be used in a thread of its own."""
    if request.param == "as NCCL":
        monkeypatch.setattr(dist, "ProcessGroupGloo", MeetsAsNCCL)
    port = reserve_port(HOST)
    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        made = threads.map(
            lambda place: WeightLine(HOST, port, place, 1 + RECEIVERS, "cpu", TIMEOUT), range(SENDER, 1 + RECEIVERS)
        )
        yield list(made)


def push(ends, weights):
    """What each receiver gets of the weights."""
    sender, *receivers = ends
    with ThreadPoolExecutor(1 + RECEIVERS) as threads:
        sent = threads.submit(sender.send, iter(weights))
        received = list(threads.map(lambda end: list(end.receive()), receivers))
        sent.result()
    return received


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        ("matrix", torch.randn(5, 7, generator=generator)),
        ("half", torch.randn(3, 2, generator=generator).bfloat16()),
        ("turned", torch.randn(4, 6, generator=generator).T),
        ("number", torch.randn((), generator=generator)),
        ("none", torch.empty(0, 3)),
        ("count", torch.tensor([seed, 2**40])),
    ]


def test_every_tensor_arrives_in_every_push(ends):
    for seed in (1, 2, 3):
        sent = weights(seed)
        for received in push(ends, sent):
            assert [name for name, _ in received] == [name for name, _ in sent]
            for (name, tensor), (_, expected) in zip(received, sent, strict=True):
                assert tensor.dtype == expected.dtype, name
                assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("changed", [("matrix", torch.zeros(5, 8)), ("matrix", torch.zeros(5, 7).half())])
def test_a_push_of_other_tensors_than_the_first_is_refused_before_it_is_sent(ends, changed):
    push(ends, weights(1))
    with pytest.raises(ValueError, match=r"pushed weight 0: expected \['matrix', \[5, 7\], 'float32'\].*got"):
        ends[SENDER].send(iter([changed]))
