"""Weights from the ranks that train to engines on devices of their own: NCCL between GPUs, gloo on CPU.

The two are groups of processes of their own, with ranks from 0 on. Rank 0 of those that train and all ranks of the
engines are in a third, in which each tensor is broadcast when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from verl.utils.rendezvous import store_at

# The sender's place among those on the line.
SENDER = 0


class WeightLine:
    """One end of the line; all ends are built at the same time.

    Args:
        address, port: where the sender listens.
        place: of this process, 0 for the sender.
        size: of the line, the sender included.
        device: on which tensors are sent and received.
        timeout: how long the ends wait for each other.
    """

    def __init__(self, address: str, port: int, place: int, size: int, device: str, timeout: timedelta):
        self.device = torch.device(device)
        meeting = store_at(address, port, place == SENDER, size, timeout)
        # Keys apart: NCCL too puts what its processes meet by under "0".
        self.store, groups = (dist.PrefixStore(prefix, meeting) for prefix in ("weights", "group"))
        # Made directly: torch's own groups are parts of the one that a process has been initialised with.
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(groups, place, size, options)
        else:
            self.group = dist.ProcessGroupGloo(groups, place, size, timeout)
        # Name, shape and type of every tensor, in the order of the first push; an empty one is the end.
        self.headers: list[list] = []

    def send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send every tensor to all receivers; each push has the same names, shapes and types in the same order.

        Raises:
            ValueError: this one has others than the first.
        """
        number = -1
        for number, (name, tensor) in enumerate(weights):
            self._announce(number, [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
            self._broadcast(tensor.to(self.device).contiguous())
        self._announce(number + 1, [])

    def _announce(self, number: int, header: list) -> None:
        if number == len(self.headers):
            self.headers.append(header)
            self.store.set(str(number), json.dumps(header))
        elif self.headers[number] != header:
            expected = self.headers[number]
            raise ValueError(f"pushed weight {number}: expected {expected}, as in the first push, got {header}")

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one push as they come. They must be exhausted, as the others wait."""
        for number in range(2**62):
            if number == len(self.headers):
                self.headers.append(json.loads(self.store.get(str(number))))
            if not self.headers[number]:
                return
            name, shape, dtype = self.headers[number]
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self._broadcast(tensor)
            yield name, tensor

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if tensor.numel() == 0:
            return
        # Bytes, as not every backend knows every type.
        self.group.broadcast(tensor.view(-1).view(torch.uint8), SENDER).wait()
