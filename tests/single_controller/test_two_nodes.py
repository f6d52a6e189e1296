"""A pool over two Ray nodes, neither of them the driver's. Both nodes run on this machine."""

import os
import sys

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, processes

pytestmark = pytest.mark.distributed

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Reducer(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def describe(self):
        node = ray.get_runtime_context().get_node_id()
        return node, self.local_rank, self.get_master_addr_port(), os.environ["OMP_NUM_THREADS"]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def all_reduce(self):
        torch.distributed.init_process_group("gloo")
        total = torch.tensor(float(self.rank + 1))
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        return total.item()


@pytest.fixture
def two_nodes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2)
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes(two_nodes, monkeypatch):
    # The cluster has four CPUs, but no node has three.
    with pytest.raises(ValueError, match=r"per node: CPU \[3\].*Each node's processes must fit on one node"):
        RayResourcePool([3], use_gpu=False).get_placement_groups()

    group = RayWorkerGroup(RayResourcePool([1, 1], use_gpu=False, max_colocate_count=2), RayClassWithInitArgs(Reducer))
    (node0, local0, master0, threads0), (node1, local1, master1, threads1) = group.describe()
    assert node0 != node1
    assert (local0, local1) == (0, 0)
    assert master0 == master1
    assert master0[0] == ray.util.get_node_ip_address()
    # Two CPUs on each node for the one process there.
    assert (threads0, threads1) == ("2", "2")
    assert group.all_reduce() == [3.0, 3.0]

    # Both nodes are this machine; what the driver cannot see itself, it has the nodes say.
    monkeypatch.setattr(processes, "_ranks_here", lambda mark: {})
    for rank, text in enumerate(group._processes.reports()):
        assert text.startswith(f"rank {rank} of 2: process ") and "most recent call first" in text
