"""Where the ranks of a run meet: a store of keys and values that rank 0 serves."""

from __future__ import annotations

import os
import random
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch.distributed as dist

# Below the range from which Linux hands out ports for outgoing connections (32768 upwards).
PORTS = range(20000, 32768)
_TRIES = 200

# Bound sockets that do not listen yet, by address.
_reserved: dict[tuple[str, int], socket.socket] = {}


def reserve_port(host: str) -> int:
    """A TCP port at `host` that is this process's from now on, for `meeting_store` or for whoever else in it listens
    there: a port that is only looked up can be another's before it is used. Raises RuntimeError if none is free."""
    # Not the seeded global generator: two runs with one seed on one machine would try the same ports.
    for port in random.SystemRandom().sample(PORTS, _TRIES):
        try:
            # Others that share it would be let in too: two runs could hold one port until the first of them listens.
            _reserved[host, port] = _bound(host, port, shared=False)
        except OSError:
            continue
        # From here on others of this process may bind to it, for as long as it does not listen.
        _reserved[host, port].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return port
    raise RuntimeError(f"no free TCP port on {host}: tried {_TRIES} between {PORTS[0]} and {PORTS[-1]}")


def interface_of(address: str) -> str:
    """The network interface of this machine that has the address. Raises OSError if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    raise OSError(f"no network interface of this machine has the address {address}")


def meeting_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, for `init_process_group`. Rank 0 listens at that address and no other; a
    rank alone needs none.

    What torch makes by itself listens on every interface, and whoever reaches it may read and write without a word of
    who he is.
    """
    import torch.distributed as dist

    if world_size == 1:
        return dist.HashStore()
    return store_at(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0, world_size, timeout)


def store_at(host: str, port: int, serves: bool, size: int, timeout: timedelta) -> dist.Store:
    """The store of so many processes at an address, which one of them `serves`, at that address and no other."""
    # Ports are chosen, and interfaces found, without torch.
    import torch.distributed as dist

    if not serves:
        return dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    listening = _reserved.pop((host, port), None) or _bound(host, port, shared=True)
    listening.listen(max(128, size))
    # The store closes the socket it is given.
    return dist.TCPStore(host, port, size, is_master=True, timeout=timeout, master_listen_fd=listening.detach())


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
