"""The ranks' meeting place, in this process alone."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from tests.faults.runs import listeners
from verl.single_controller.base.worker import find_free_port
from verl.utils.rendezvous import meeting_store

SHORT = timedelta(seconds=20)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_rank_0_listens_at_the_address_that_it_was_given_alone(monkeypatch, host):
    port = find_free_port(host)
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    before = set(listeners([psutil.Process()]))
    store = meeting_store(0, 1, SHORT)
    new = {(listener.address, listener.port) for listener in set(listeners([psutil.Process()])) - before}
    assert new == {(host, port)}
    guest = dist.TCPStore(host, port, is_master=False, timeout=SHORT)
    guest.set("key", "value")
    assert store.get("key") == b"value"
