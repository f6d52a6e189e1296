"""Where the ranks of a run meet: a store of keys and values that rank 0 serves."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist


def meeting_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, for `init_process_group`. Rank 0 listens at that address and no other.

    What torch makes by itself listens on every interface, and whoever reaches it may read and write without a word of
    who he is.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.create_server(address[:2], family=family, backlog=max(128, world_size))
    # The store closes the socket it is given.
    return dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listening.detach())
