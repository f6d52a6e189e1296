"""Which nodes a run takes, in which order, and what is compared. With real nodes: tests/faults/test_nodes_wrong.py"""

from __future__ import annotations

import pytest

from verl.single_controller.ray import nodes, starting
from verl.single_controller.ray.nodes import Node
from verl.trainer.node_checks import Needs, _differences


def test_two_nodes_without_a_cluster_are_one(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"one node of the 2, this machine \([\d.]+\).*--worker ADDRESS there"):
        starting.join_or_start(None, None, 2)


def test_nodes_are_in_the_ranks_order(monkeypatch):
    def node(name, address, cpus, alive=True):
        return Node(name, name, address, alive, {"CPU": cpus, "GPU": cpus})

    found = [
        node("a", "10.0.0.10", 8),
        node("b", "10.0.0.9", 8),
        node("c", "10.0.0.1", 4),
        node("d", "10.0.0.2", 8, False),
    ]
    monkeypatch.setattr(nodes, "all_nodes", lambda: sorted(found, key=lambda one: nodes._by_number(one.address)))
    free = {"a": {"CPU": 8, "GPU": 8}, "b": {"CPU": 8, "GPU": 8}, "c": {"CPU": 4, "GPU": 4}}
    monkeypatch.setattr(nodes, "available_resources_per_node", lambda: free)

    def names(counts):
        chosen = nodes.choose_nodes(counts, {"CPU": 1, "GPU": 1})
        return None if chosen is None else "".join(node.name for node in chosen)

    # c is too small for eight, d is gone; 9 comes before 10.
    assert names([8, 8]) == "ba"
    assert names([4, 8]) == "cb"
    assert names([8, 8, 8]) is None
    # Another run has a GPU of b.
    free["b"]["GPU"] = 7
    assert names([8, 8]) is None and names([4, 7]) == "cb" and names([8]) == "a"


def test_what_a_driver_lacks_need_not_be_there(tmp_path):
    here = {"versions": {"torch": "2", "vllm": None}, "code": ("/a", "1"), "paths": {"/m": {"x": 1}}}
    there = here | {"versions": {"torch": "2", "vllm": "1"}, "free": 2**40}
    node = Node("1", "b", "10.0.0.2", True, {})
    assert list(_differences(node, there, here, Needs(["/m"], [], tmp_path))) == []
    [other] = _differences(node, there | {"paths": {"/m": {"x": 2}}}, here, Needs(["/m"], [], tmp_path))
    assert other.startswith(
        "node b (10.0.0.2): /m differs from the driver's in x: put it on storage that all nodes see"
    )
