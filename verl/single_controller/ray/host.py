"""The process of a rank, as a Ray actor: begun before it is known what it will do, then one worker for each role."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray

from verl.single_controller.base import ClassWithInitArgs
from verl.single_controller.base.worker import colocate
from verl.single_controller.ray.output import log_in_rank
from verl.utils.rendezvous import interface_of, reserve_port
from verl.utils.stacks import answer_when_asked

NETWORK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class WorkerHost:
    """The Ray actor: one process, holding one worker object per role.

    Args:
        roles: their names.
        one_node: whether all ranks are on one node.
    """

    def __init__(self, roles: Iterable[str], one_node: bool) -> None:
        answer_when_asked()
        log_in_rank()
        self._roles, self._one_node = list(roles), one_node

    def prepare(self, work: Callable[[], None]) -> None:
        """Do what can be done before the workers are known."""
        work()

    def meeting_place(self) -> tuple[str, int]:
        """An address and a port of this process, rank 0's."""
        # One node needs no other address than the loopback's.
        address = "127.0.0.1" if self._one_node else ray.util.get_node_ip_address()
        return address, reserve_port(address)

    def build(self, roles: Mapping[str, ClassWithInitArgs], address: str, port: int) -> None:
        """Construct the workers, whose ranks meet there."""
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        if not self._one_node:
            # By default gloo listens where the host's name points to, which on many machines is the loopback.
            for name in set(NETWORK) - os.environ.keys():
                os.environ[name] = interface_of(ray.util.get_node_ip_address())
        self._workers = {role: cls_with_args() for role, cls_with_args in roles.items()}
        colocate(self._workers)

    def call(self, role: str, method_name: str, /, *args: Any, **kwargs: Any) -> Any:
        # The driver, which starts this process, knows the class before it has loaded torch.
        from verl.utils.profiling import marked

        with marked(f"{role}.{method_name}"):
            return getattr(self._workers[role], method_name)(*args, **kwargs)

    def __repr__(self) -> str:
        # Ray puts this before each line the process prints and into its tracebacks.
        return f"{'+'.join(self._roles)}[rank {os.environ['RANK']}]"
