"""Worker groups on a real Ray cluster of two CPUs: sharing out, colocation, torch.distributed, failing."""

import os
import sys
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group_table, remove_placement_group

from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import (
    Dispatch,
    Execute,
    make_nd_compute_dataproto_dispatch_fn,
    register,
    register_dispatch_mode,
)
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
    merge_resource_pool,
    pools,
)

pytestmark = pytest.mark.distributed

# Ray's worker processes cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def rows(*values: float) -> DataProto:
    return DataProto.from_dict(tensors={"x": torch.tensor(values, dtype=torch.float)})


def column(data: DataProto) -> list[float]:
    return data.batch["x"].tolist()


def _dispatch_reversed(group, values):
    return (list(reversed(values)),), {}


def _collect_sum(group, outputs):
    return sum(outputs)


register_dispatch_mode("REVERSED", _dispatch_reversed, _collect_sum)


class Calculator(Worker):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        # One data-parallel group of both ranks, answered by rank 1.
        self.register_dispatch_collect_info("pair", dp_rank=0, is_collect=self.rank == 1)
        # Rank 1 has the first chunk.
        self.register_dispatch_collect_info("swapped", dp_rank=1 - self.rank, is_collect=True)
        self.register_dispatch_collect_info("nobody", dp_rank=0, is_collect=False)

    def _add(self, data: DataProto, amount: float = 0.0) -> DataProto:
        return DataProto.from_dict(tensors={"x": data.batch["x"] + amount})

    @register(dispatch_mode=Dispatch.RANK_ZERO)
    def rank_zero(self, value):
        return self.rank, value

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def one_to_all(self, value):
        return self.rank, value

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, execute_mode=Execute.RANK_ZERO)
    def one_to_all_on_rank_zero(self, value):
        return self.rank, value

    @register(dispatch_mode=Dispatch.ALL_TO_ALL)
    def all_to_all(self, value, factor):
        return value * factor

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def dp_compute(self, value):
        return self.rank * 100 + value

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def proto(self, data, amount=0.0):
        return self._add(data, amount + 100 * self.rank)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def proto_sum(self, data, other):
        return self._add(data, other.batch["x"])

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def proto_twice(self, data):
        return data.repeat(2, interleave=True)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def proto_metrics(self, data):
        return DataProto(meta_info={"metrics": {"mean": data.batch["x"].mean().item()}})

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO, blocking=False)
    def proto_later(self, data):
        return self._add(data, 1.0)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO_WITH_FUNC)
    def proto_with_func(self, function, data):
        return function(self, data)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC)
    def metric(self, data):
        return data.batch["x"].sum().item()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("pair"))
    def on_pair(self, data):
        return self._add(data, 10 * self.rank)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("swapped"))
    def on_swapped(self, data):
        return self._add(data, 10 * self.rank)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("nobody"))
    def on_nobody(self, data):
        return data

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("missing"))
    def on_missing(self, data):
        return data

    @register(dispatch_mode=Dispatch.REVERSED)
    def reversed_weighted(self, value):
        return value * (self.rank + 1)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_offset(self, offset):
        self.offset = offset

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def get_offset_and_pid(self):
        return self.offset, os.getpid()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def environment(self):
        names = (
            "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS TOKENIZERS_PARALLELISM "
            "GLOO_SOCKET_IFNAME"
        )
        return {name: os.environ.get(name) for name in names.split()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def all_reduce(self):
        torch.distributed.init_process_group("gloo")
        total = torch.tensor(float(self.rank + 1))
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        return total.item()


class Clumsy(Worker):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        if broken and self.rank == 1:
            raise OSError("no model at /nowhere")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def rank_one_raises(self):
        if self.rank == 1:
            raise KeyError("attention_mask of rank 1")
        time.sleep(60)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def rank_one_dies_and_zero_notices(self):
        if self.rank == 1:
            time.sleep(0.5)
            os._exit(3)
        time.sleep(0.4)
        raise ConnectionError("peer closed the connection")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def sleep(self):
        time.sleep(60)


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_pool(cluster):
    pools = []

    def make(process_on_nodes, **options):
        pools.append(RayResourcePool(process_on_nodes, use_gpu=False, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.release()


@pytest.fixture
def pool(make_pool):
    return make_pool([2])


@pytest.fixture(scope="class")
def group(cluster):
    pool = RayResourcePool([2], use_gpu=False)
    yield RayWorkerGroup(pool, RayClassWithInitArgs(Calculator, offset=5.0))
    pool.release()


class TestDispatch:
    def test_rank_zero(self, group):
        assert group.rank_zero("a") == (0, "a")
        assert group.one_to_all_on_rank_zero(value="b") == (0, "b")

    def test_one_to_all(self, group):
        # A list with one element per rank is not taken apart.
        assert group.one_to_all([7, 8]) == [(0, [7, 8]), (1, [7, 8])]

    def test_all_to_all(self, group):
        assert group.all_to_all([2, 3], factor=[10, 100]) == [20, 300]
        assert group.dp_compute([1, 2]) == [1, 102]

    @pytest.mark.parametrize(("value", "got"), [([1, 2, 3], "3 elements"), (4, "a int")])
    def test_wrong_shares(self, group, value, got):
        with pytest.raises(ValueError, match=f"cannot dispatch dp_compute: expected a list with 2 elements.* {got}"):
            group.dp_compute(value)

    def test_proto(self, group):
        # Rank 0 has 1, 2 and adds 0.5; rank 1 has 3, 4 and adds 100.5.
        assert column(group.proto(rows(1, 2, 3, 4), amount=0.5)) == [1.5, 2.5, 103.5, 104.5]
        assert column(group.proto_sum(rows(1, 2), other=rows(30, 40))) == [31, 42]

    def test_proto_pads_and_unpads(self, group):
        # Three rows become 1, 2 | 3, 1; the copy's answer is dropped.
        assert column(group.proto(rows(1, 2, 3))) == [1, 2, 103]
        assert column(group.proto(rows(9))) == [9]
        # k answers per row: the copy's k answers are dropped.
        assert column(group.proto_twice(rows(1, 2, 3))) == [1, 1, 2, 2, 3, 3]

    def test_metrics_of_a_padded_batch_are_refused(self, group):
        assert group.proto_metrics(rows(1, 2, 3, 5)).meta_info["metrics"] == [{"mean": 1.5}, {"mean": 4.0}]
        with pytest.raises(ValueError, match="3 rows was padded with 1 copies to 4, and the result has 0 rows"):
            group.proto_metrics(rows(1, 2, 3))
        assert group.metric(rows(1, 2, 3, 5)) == [3.0, 8.0]
        with pytest.raises(ValueError, match=r"3 rows cannot be cut into 2 equal chunks.*multiple of 2"):
            group.metric(rows(1, 2, 3))

    def test_batches_that_cannot_be_shared_out(self, group):
        with pytest.raises(ValueError, match=r"cannot dispatch proto: .* got 1 with \[0\] rows"):
            group.proto(rows())
        with pytest.raises(ValueError, match=r"cannot dispatch proto: .* got 0 with \[\] rows"):
            group.proto([1, 2])
        with pytest.raises(ValueError, match=r"got 2 with \[2, 4\] rows"):
            group.proto_sum(rows(1, 2), rows(1, 2, 3, 4))

    def test_proto_with_func(self, group):
        def add_rank(worker, data):
            return DataProto.from_dict(tensors={"x": data.batch["x"] + worker.rank})

        assert column(group.proto_with_func(add_rank, rows(1, 2, 3))) == [1, 2, 4]
        with pytest.raises(ValueError, match="first positional argument must be a function"):
            group.proto_with_func(rows(1, 2), add_rank)

    def test_meshes(self, group):
        # Both ranks see all rows, rank 1 answers; one chunk needs no padding.
        assert column(group.on_pair(rows(1, 2, 3))) == [11, 12, 13]
        # Rank 1 has 1, 2 and rank 0 has 3 and a copy; the answers come back in the order of the rows.
        assert column(group.on_swapped(rows(1, 2, 3))) == [11, 12, 3]

    def test_wrong_meshes(self, group):
        with pytest.raises(ValueError, match=r"mesh 'nobody': .*one collecting rank each, got .*\(0, False\)"):
            group.on_nobody(rows(1))
        with pytest.raises(ValueError, match=r"Calculator has no mesh 'missing'; known: .*'nobody', 'pair', 'swapped'"):
            group.on_missing(rows(1))

    def test_registered_mode(self, group):
        # Rank 0 gets 2, rank 1 gets 1: 2 * 1 + 1 * 2.
        assert group.reversed_weighted([1, 2]) == 4

    def test_not_blocking(self, group):
        pending = group.proto_later(rows(1, 2, 3))
        # A pending result is an argument like its value.
        assert column(group.proto(pending)) == [2, 3, 104]
        assert column(pending.get()) == [2, 3, 4]

    def test_execute(self, group):
        assert group.execute_all_sync("one_to_all", value=[7, 8]) == [(0, [7, 8]), (1, [7, 8])]
        assert group.execute_rank_zero_sync("one_to_all", 1) == (0, 1)
        assert ray.get(group.execute_all_async("one_to_all", 1)) == [(0, 1), (1, 1)]
        assert ray.get(group.execute_rank_zero_async("one_to_all", 1)) == (0, 1)

    def test_environment(self, group):
        first, second = group.environment()
        assert (first.pop("RANK"), first.pop("LOCAL_RANK")) == ("0", "0")
        assert (second.pop("RANK"), second.pop("LOCAL_RANK")) == ("1", "1")
        assert first == second
        assert first["WORLD_SIZE"] == "2"
        assert first["MASTER_ADDR"] == "127.0.0.1"
        assert 20000 <= int(first["MASTER_PORT"]) < 32768
        assert first["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert first["TOKENIZERS_PARALLELISM"] == "false"

    def test_gloo(self, group):
        assert group.all_reduce() == [3.0, 3.0]

    def test_full_pool(self, group):
        pool = RayResourcePool([1], use_gpu=False)
        with pytest.raises(ValueError, match=r"Asked for: CPU 1 .*CPU 2 \(0 free\).*Other processes or pools hold"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Calculator))


def test_colocated_roles_share_processes_but_not_state(pool):
    classes = {
        "actor": RayClassWithInitArgs(Calculator, offset=1.0),
        "critic": RayClassWithInitArgs(ray.remote(Calculator), offset=2.0),
    }
    both = RayWorkerGroup(pool, create_colocated_worker_cls(classes))
    groups = both.spawn(classes.keys())
    groups["critic"].set_offset(3.0)
    actor, critic = groups["actor"].get_offset_and_pid(), groups["critic"].get_offset_and_pid()
    assert [offset for offset, _ in actor] == [1.0, 1.0]
    assert [offset for offset, _ in critic] == [3.0, 3.0]
    assert [pid for _, pid in actor] == [pid for _, pid in critic]
    assert len({os.getpid(), *(pid for _, pid in actor)}) == 3

    with pytest.raises(ValueError, match=r"cannot call one_to_all on the roles \['actor', 'critic'\] at once"):
        both.execute_all_sync("one_to_all", 1)
    with pytest.raises(ValueError, match=r"unknown roles \['ref'\]"):
        both.spawn({"ref"})
    with pytest.raises(ValueError, match="in use by 1 worker groups, as many as its max_colocate_count allows"):
        RayWorkerGroup(pool, classes["actor"])


def leave_a_mark():
    os.environ["MARK_OF_THE_TESTS"] = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"


def fail():
    raise ValueError("a library is broken")


class Marked(Worker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def mark(self):
        return os.environ.get("MARK_OF_THE_TESTS")


def test_processes_begun_before_their_workers_are_known(pool):
    pool.begin(["Marked"], leave_a_mark)
    group = RayWorkerGroup(pool, RayClassWithInitArgs(Marked))
    assert group.mark() == ["0 of 2", "1 of 2"]
    group.shutdown()
    # They are taken once: the next group's are fresh.
    assert RayWorkerGroup(pool, RayClassWithInitArgs(Marked)).mark() == [None, None]


def test_what_goes_wrong_before_they_are_known_is_the_groups_error(make_pool):
    pool = make_pool([2])
    pool.begin(["Marked"], fail)
    with pytest.raises(ValueError, match="a library is broken"):
        RayWorkerGroup(pool, RayClassWithInitArgs(Marked))
    pool.release()
    pool.begin(["Marked"], leave_a_mark)
    pool.release()
    assert RayWorkerGroup(pool, RayClassWithInitArgs(Marked)).mark() == [None, None]


def test_groups_in_turn_and_merged_pools(make_pool):
    first, second = make_pool([1]), make_pool([1])
    merged = merge_resource_pool(first, second)
    group = RayWorkerGroup(merged, RayClassWithInitArgs(Calculator))
    # Both placement groups are on the one node there is.
    assert [env["LOCAL_RANK"] for env in group.environment()] == ["0", "1"]
    group.shutdown()
    again = RayWorkerGroup(merged, RayClassWithInitArgs(Calculator))
    assert again.one_to_all(1) == [(0, 1), (1, 1)]
    with pytest.raises(ValueError, match="same use_gpu; got False and True"):
        merge_resource_pool(first, RayResourcePool([1], use_gpu=True))


def test_two_groups_share_bundles_when_allowed(make_pool):
    pool = make_pool([1], max_colocate_count=2)
    groups = [RayWorkerGroup(pool, RayClassWithInitArgs(Calculator, offset=i)) for i in range(2)]
    (first,), (second,) = (group.get_offset_and_pid() for group in groups)
    assert (first[0], second[0]) == (0, 1)
    assert first[1] != second[1]


class TestFailures:
    def test_first_error_surfaces_while_the_other_rank_sleeps(self, pool):
        group = RayWorkerGroup(pool, RayClassWithInitArgs(Clumsy))
        start = time.monotonic()
        with pytest.raises(KeyError, match="attention_mask of rank 1") as raised:
            group.rank_one_raises()
        assert time.monotonic() - start < 10
        assert "Clumsy[rank 1]" in str(raised.value)
        assert "in rank_one_raises" in str(raised.value)

    def test_killed_process(self, pool):
        group = RayWorkerGroup(pool, RayClassWithInitArgs(Clumsy))
        pending = group.sleep()
        ray.kill(group._actors[1])
        start = time.monotonic()
        with pytest.raises(RayActorError, match="Clumsy rank 1 of 2 died in sleep"):
            pending.get()
        assert time.monotonic() - start < 10

    def test_death_goes_before_the_errors_it_causes(self, pool):
        group = RayWorkerGroup(pool, RayClassWithInitArgs(Clumsy))
        with pytest.raises(RayActorError, match="Clumsy rank 1 of 2 died in rank_one_dies_and_zero_notices"):
            group.rank_one_dies_and_zero_notices()

    def test_constructor(self, pool):
        with pytest.raises(OSError, match="no model at /nowhere"):
            RayWorkerGroup(pool, RayClassWithInitArgs(Clumsy, broken=True))
        # The processes are gone and the pool is free again.
        assert RayWorkerGroup(pool, RayClassWithInitArgs(Clumsy)).world_size == 2

    def test_too_few_resources(self, cluster):
        start = time.monotonic()
        with pytest.raises(ValueError, match="not enough resources for 3 worker processes") as raised:
            RayResourcePool([3], use_gpu=True).get_placement_groups()
        assert time.monotonic() - start < 2
        text = str(raised.value)
        assert "Asked for: CPU 3, GPU 3 (per node: CPU [3], GPU [3])" in text
        assert "CPU 2 (" in text and "GPU 0 (0 free)" in text
        assert "Lower trainer.n_gpus_per_node or trainer.nnodes" in text


# ---- parts of a pool


@pytest.fixture
def parts(make_pool):
    return make_pool([2]).split([1])


def test_parts_of_a_pool_are_groups_of_their_own_on_its_nodes(parts):
    groups = [RayWorkerGroup(part, RayClassWithInitArgs(Calculator)) for part in parts]
    (first,), (second,) = (group.environment() for group in groups)
    assert [one["RANK"] + one["WORLD_SIZE"] for one in (first, second)] == ["01", "01"]
    assert first["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1"), "both share the node's two CPUs"
    [[_, one]], [[_, other]] = (group.get_offset_and_pid() for group in groups)
    assert one != other


def test_parts_of_a_pool_give_their_processes_back_once(parts, monkeypatch):
    removed = []

    def remove(group):
        removed.append(group.id)
        remove_placement_group(group)

    monkeypatch.setattr(pools, "remove_placement_group", remove)
    (group,) = parts[0].get_placement_groups()
    for part in parts:
        part.release()
    assert removed == [group.id]
    assert placement_group_table(group)["state"] == "REMOVED"


def test_a_part_without_processes_on_a_node(make_pool):
    with pytest.raises(ValueError, match="expected one or more processes on each node"):
        make_pool([2]).split([2])


class Slow(Worker):
    """Calls of its that go on while others are waited for."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def begin(self, seconds: float, ends: str = "well"):
        time.sleep(seconds)
        if ends == "dead":
            os._exit(3)
        if ends == "broken":
            raise KeyError("no weights")
        return "written"

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def work(self, seconds: float):
        time.sleep(seconds)
        return "trained"


@pytest.mark.parametrize(
    ("ends", "error", "says"),
    [("broken", KeyError, "no weights"), ("dead", RayActorError, "Slow rank 0 of 1 died in begin")],
)
def test_what_goes_on_fails_while_another_group_is_waited_for(parts, ends, error, says):
    trained, writing = (RayWorkerGroup(part, RayClassWithInitArgs(Slow)) for part in parts)
    begun = time.monotonic()
    writing.begin(0.5, ends)
    with pytest.raises(error, match=says):
        trained.work(60)
    assert time.monotonic() - begun < 30


def test_what_goes_on_and_ends_well_disturbs_nobody(parts):
    trained, writing = (RayWorkerGroup(part, RayClassWithInitArgs(Slow)) for part in parts)
    pending = writing.begin(0.1)
    assert trained.work(1.0) == ["trained"]
    assert pending.get() == ["written"]
    again = writing.begin(0.1)
    assert again.get() == ["written"] and trained.work(0.1) == ["trained"]


def test_what_is_waited_for_names_the_calls_that_go_on():
    """Played: the groups' processes stand still nowhere."""
    under_way, groups = {}, []
    for role in ("actor_rollout", "rollout"):
        group = object.__new__(RayWorkerGroup)
        group._world_size, group._role, group._roles, group._under_way = 1, role, {role: None}, under_way
        group._processes = SimpleNamespace(stuck=lambda ranks: {})
        groups.append(group)
    trained, writing = groups
    writing.goes_on(["handle"], "generate_sequences")
    said = "actor_rollout rank 0 of 1 has not answered update_actor"
    also = "rollout rank 0 of 1 has not answered generate_sequences"
    assert trained._all_unanswered([0], "update_actor") == f"{said}; {also}"
    under_way.clear()
    assert trained._all_unanswered([0], "update_actor") == said
