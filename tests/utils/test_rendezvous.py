"""The ranks' meeting place, in this process alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from tests.faults.runs import listeners
from verl.utils import rendezvous
from verl.utils.rendezvous import PORTS, meeting_store, reserve_port

SHORT = timedelta(seconds=20)


def own_listeners() -> set[tuple[str, int]]:
    return {(listener.address, listener.port) for listener in listeners([psutil.Process()])}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_rank_0_listens_at_the_address_that_it_was_given_alone(monkeypatch, host):
    before = own_listeners()
    port = reserve_port(host)
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert own_listeners() == before
    with ThreadPoolExecutor() as pool:
        store, guest = pool.map(lambda rank: meeting_store(rank, 2, SHORT), range(2))
    assert own_listeners() - before == {(host, port)}
    guest.set("key", "value")
    assert store.get("key") == b"value"


def test_a_reserved_port_is_nobody_elses():
    port = reserve_port("127.0.0.1")
    assert port in PORTS
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert len({port, *(reserve_port("127.0.0.1") for _ in range(20))}) == 21
    # Code of the same process that meets in torch's own way listens there.
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, timeout=SHORT)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_two_runs_do_not_reserve_one_port(monkeypatch):
    """Three of the four ports are another process's, which has reserved them and does not listen."""
    code = "from verl.utils.rendezvous import *; print([reserve_port('127.0.0.1') for _ in '123'], flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        taken = json.loads(other.stdout.readline())
        free = reserve_port("127.0.0.1")
        rendezvous._reserved.pop(("127.0.0.1", free)).close()
        monkeypatch.setattr(rendezvous, "PORTS", [*taken, free])
        monkeypatch.setattr(rendezvous, "_TRIES", 4)
        assert reserve_port("127.0.0.1") == free
        with pytest.raises(RuntimeError, match="no free TCP port"):
            reserve_port("127.0.0.1")
    finally:
        other.kill()
        other.communicate()


def test_a_rank_alone_listens_nowhere(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    before = own_listeners()
    store = meeting_store(0, 1, SHORT)
    store.set("key", "value")
    assert store.get("key") == b"value" and own_listeners() == before
