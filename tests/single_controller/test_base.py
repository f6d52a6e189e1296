"""What needs no worker process: registration, the node fit, and that `base` does not know Ray."""

import ast
from pathlib import Path

import pytest

import verl.single_controller
from verl.single_controller.base import ResourcePool, Worker, WorkerGroup
from verl.single_controller.base.decorator import (
    Dispatch,
    Execute,
    get_predefined_dispatch_fn,
    register,
    register_dispatch_mode,
    update_dispatch_mode,
)
from verl.single_controller.ray.resources import _fits


def test_base_does_not_import_ray():
    for path in (Path(verl.single_controller.__file__).parent / "base").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "ray" or "single_controller.ray" in name], path


def test_worker_outside_a_group_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"RANK is not set.*RANK=0 WORLD_SIZE=1 LOCAL_RANK=0"):
        Worker()


def test_worker_places(monkeypatch):
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "7",
    }.items():
        monkeypatch.setenv(name, value)
    worker = Worker()
    assert (worker.rank, worker.world_size, worker.local_rank) == (3, 4, 1)
    assert worker.get_master_addr_port() == ("h", 7)
    worker.register_dispatch_collect_info("actor", dp_rank=2, is_collect=True)
    assert worker.query_dispatch_info("actor") == (2, True)
    with pytest.raises(ValueError, match="'actor' is registered already"):
        worker.register_dispatch_collect_info("actor", dp_rank=0, is_collect=True)


def test_register_refuses_what_cannot_work():
    with pytest.raises(TypeError, match=r"expected a member of Dispatch.* got 'ONE_TO_ALL'"):
        register(dispatch_mode="ONE_TO_ALL")
    with pytest.raises(ValueError, match="would run the first chunk only"):
        register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, execute_mode=Execute.RANK_ZERO)


def test_own_dispatch_modes():
    with pytest.raises(ValueError, match=r"Dispatch.ONE_TO_ALL exists"):
        register_dispatch_mode("ONE_TO_ALL", print, print)
    register_dispatch_mode("OWN", print, print)
    update_dispatch_mode(Dispatch.OWN, print, repr)
    assert get_predefined_dispatch_fn(Dispatch.OWN) == {"dispatch_fn": print, "collect_fn": repr}


def test_registered_name_must_not_hide_the_groups_own():
    class Wrong(Worker):
        @register()
        def execute_all_sync(self):
            pass

    with pytest.raises(ValueError, match=r"Wrong.execute_all_sync is registered, but a worker group has its own"):
        WorkerGroup(1)._bind_worker_methods(Wrong)


@pytest.mark.parametrize("process_on_nodes", [[], [0], [2, 0]])
def test_pool_needs_processes(process_on_nodes):
    with pytest.raises(ValueError, match="expected one or more processes on each node"):
        ResourcePool(process_on_nodes)


@pytest.mark.parametrize(
    ("process_on_nodes", "fits"),
    [([8, 8], True), ([4, 8, 4], True), ([9], False), ([8, 4, 8], False), ([4, 4, 4, 4], True), ([6, 6, 4], False)],
)
def test_each_nodes_processes_fit_on_one_node(process_on_nodes, fits):
    # Each has room for 8 processes: the first has no CPUs for a ninth, the second no GPU.
    nodes = [{"CPU": 17.0, "GPU": 10.0}, {"CPU": 64.0, "GPU": 8.0}]
    assert _fits(process_on_nodes, {"CPU": 2, "GPU": 1}, nodes) is fits
