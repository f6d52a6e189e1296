"""Memory that leaves and comes back: nothing about training may change, and nothing may be read while it is gone."""

import itertools

import pytest
import torch
from torch import nn

from tests.memory import offload_on_a_gpu, offload_on_two_ranks
from verl.memory.offload import HostCopy, Offloader, build_offloader
from verl.trainer.config import compose_config

FLAGS = [(True, True), (True, False), (False, True)]


class Tied(nn.Module):
    """An embedding that is its own head, and a bias that looks into another tensor's storage."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def trained(offload: bool, steps: int = 3) -> tuple[Tied, torch.optim.Optimizer, Offloader]:
    torch.manual_seed(0)
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    offloader = Offloader(module, optimizer, params=offload, optimizer_states=offload)
    for number in range(steps):
        with offloader.on_device(optimizer=True):
            module(torch.tensor([number, 3])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return module, optimizer, offloader


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    torch.multiprocessing.spawn(offload_on_two_ranks.run, args=(2, folder), nprocs=2)
    return torch.load(folder / "seen.pt")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- sharded, on two ranks ---


@pytest.mark.distributed
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("params", "states"), FLAGS)
def test_offloading_changes_no_bit_of_a_sharded_training(two_ranks, reshard, params, states):
    plain, offloaded = two_ranks[reshard, False, False], two_ranks[reshard, params, states]
    for part in ("weights", "states", "state_dict"):
        assert same(plain[part], offloaded[part]), part
    assert len(plain["states"]) == 3 * len(plain["weights"])
    for before, after in zip(plain["log_probs"], offloaded["log_probs"], strict=True):
        assert torch.equal(before, after)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(plain["log_probs"])]
    assert all(moved), "the updates did nothing, so equal weights would say nothing"


@pytest.mark.distributed
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("params", "states"), FLAGS)
def test_a_sharded_model_takes_no_memory_while_it_rests(two_ranks, reshard, params, states):
    seen, plain = two_ranks[reshard, params, states], two_ranks[reshard, False, False]
    for resting, alone in zip(seen["resting"], plain["resting"], strict=True):
        assert resting["params"] == (0 if params else alone["params"])
        assert resting["states"] == (0 if states else alone["states"])
        # Putting the shards away includes putting away what a forward had gathered.
        assert resting["whole"] == (0 if params else alone["whole"])
    assert plain["resting"][-1]["params"] > 0 and plain["resting"][-1]["states"] > plain["resting"][-1]["params"]
    assert plain["resting"][1]["whole"] > 0, "nothing was left gathered, so putting it away was not tried"
    assert seen["inside"] == plain["inside"]
    assert seen["same_shards"]


# --- one process ---


def test_tied_weights_and_states_survive_bit_for_bit():
    plain, plain_optimizer, _ = trained(offload=False)
    module, optimizer, offloader = trained(offload=True)
    assert module.embedding.weight.untyped_storage().nbytes() == 0
    assert all(v.untyped_storage().nbytes() == 0 for s in optimizer.state.values() for v in s.values())
    with offloader.on_device(optimizer=True):
        assert module.head.weight is module.embedding.weight
        assert same(module.state_dict(), plain.state_dict())
        state, expected = optimizer.state_dict()["state"][0], plain_optimizer.state_dict()["state"][0]
        assert same(state, expected) and expected["step"] == 3


def test_views_of_one_storage_move_once_and_stay_views():
    whole = torch.arange(12.0)
    row, column = whole[4:8], whole.view(3, 4)[:, 1]
    copy = HostCopy(lambda: [row, column, whole])
    copy.to_host()
    assert copy._buffer.numel() == 512  # 12 * 4 bytes once, not three times, rounded up to the alignment
    assert whole.untyped_storage().nbytes() == 0
    copy.to_device()
    assert whole.tolist() == [float(i) for i in range(12)]
    whole[5] = -1
    assert row.tolist() == [4, -1, 6, 7] and column.tolist() == [1, -1, 9]


def test_a_tensor_of_any_kind_of_number_comes_back_as_it_was():
    tensors = [
        torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        torch.tensor(7),
        torch.empty(0),
        torch.tensor([True, False]),
        torch.randn(2, 600)[:, ::2],
    ]
    before = [t.clone() for t in tensors]
    copy = HostCopy(lambda: tensors)
    copy.to_host()
    copy.to_device()
    for tensor, expected in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num()) and tensor.dtype == expected.dtype


def test_the_host_buffer_is_kept_and_follows_a_collection_that_grows():
    tensors = [torch.ones(1000)]
    copy = HostCopy(lambda: tensors)
    copy.to_host()
    buffer = copy._buffer.data_ptr()
    copy.to_device()
    tensors[0] *= 2
    copy.to_host()
    assert copy._buffer.data_ptr() == buffer
    copy.to_device()
    tensors.append(torch.full((500,), 3.0))
    copy.to_host()
    assert [t.untyped_storage().nbytes() for t in tensors] == [0, 0]
    copy.to_device()
    assert tensors[0].tolist() == [2.0] * 1000 and tensors[1].tolist() == [3.0] * 500


def test_nothing_to_move_is_nothing_to_do():
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    offloader = Offloader(module, optimizer, params=False, optimizer_states=True)
    offloader.rest()
    with offloader.on_device(optimizer=True):
        assert module(torch.tensor([1])).shape == (1, 10)
    frozen = Offloader(Tied(), None, params=True, optimizer_states=True)
    frozen.rest()
    with frozen.on_device(optimizer=True):
        pass


def test_states_loaded_from_a_checkpoint_take_the_place_of_the_old_ones():
    module, optimizer, offloader = trained(offload=True)
    with offloader.on_device(optimizer=True):
        saved = {key: value for key, value in optimizer.state_dict().items()}
        saved["state"] = {0: {key: value.clone() + 1 for key, value in saved["state"][0].items()}}
        optimizer.load_state_dict(saved)
    assert all(v.untyped_storage().nbytes() == 0 for s in optimizer.state.values() for v in s.values())
    with offloader.on_device(optimizer=True):
        assert same(optimizer.state_dict()["state"][0], saved["state"][0])
        assert optimizer.state[module.head.weight]["step"] == 4


def test_blocks_nest_and_only_the_outermost_one_ends_the_work():
    module, optimizer, offloader = trained(offload=True)
    moments = optimizer.state[module.head.weight]["exp_avg"].untyped_storage()
    with offloader.on_device():
        assert moments.nbytes() == 0
        with offloader.on_device(optimizer=True):
            assert moments.nbytes() == 160
        assert moments.nbytes() == 0
        with offloader.on_device():
            pass
        assert module.head.weight.untyped_storage().nbytes() == 160
    assert module.head.weight.untyped_storage().nbytes() == 0


def test_an_exception_leaves_everything_where_it_is_and_is_not_replaced():
    module, _, offloader = trained(offload=True)
    with pytest.raises(KeyError, match="the cause"), offloader.on_device():
        module(torch.tensor([1])).sum().backward()
        raise KeyError("the cause")
    assert module.head.weight.untyped_storage().nbytes() == 160
    module.zero_grad()
    with offloader.on_device():
        pass
    assert module.head.weight.untyped_storage().nbytes() == 0


def test_gradients_that_would_stay_behind_are_refused():
    module, _, offloader = trained(offload=True)
    with pytest.raises(RuntimeError, match=r"embedding\.weight has a gradient.*zero_grad"), offloader.on_device():
        module(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize(("params", "states"), FLAGS)
def test_gradients_of_a_whole_update_are_spent_at_its_end(params, states):
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    offloader = Offloader(module, optimizer, params, states)
    with offloader.on_device(optimizer=True):
        module(torch.tensor([1])).sum().backward()
        optimizer.step()
    assert module.head.weight.grad is None


def test_without_offloading_gradients_are_left_alone():
    module = Tied()
    with Offloader(module, torch.optim.AdamW(module.parameters()), False, False).on_device(optimizer=True):
        module(torch.tensor([1])).sum().backward()
    assert module.head.weight.grad is not None


def test_what_is_out_cannot_be_used():
    module, optimizer, _ = trained(offload=True)
    for use in (lambda: module(torch.tensor([1])), module.state_dict, module.head.state_dict):
        with pytest.raises(RuntimeError, match=r"parameters are in host memory.*on_device\(\)"):
            use()
    for use in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="in host memory"):
            use()


def test_states_that_are_out_cannot_be_used_while_the_parameters_are_there():
    _, optimizer, offloader = trained(offload=True)
    with offloader.on_device():
        for use in (optimizer.step, optimizer.state_dict):
            with pytest.raises(RuntimeError, match=r"states are in host memory.*optimizer=True"):
                use()


# --- the decision ---


@pytest.mark.parametrize(("device", "rests"), [("cpu", False), ("cuda", True)])
def test_only_a_model_on_a_gpu_is_moved(device, rests):
    group = "actor_rollout_ref.actor.fsdp_config"
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    config = compose_config([*required, f"{group}.param_offload=True", f"{group}.optimizer_offload=True"])
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters())
    build_offloader(module, optimizer, config.actor_rollout_ref.actor.fsdp_config, device).rest()
    assert (module.head.weight.untyped_storage().nbytes() == 0) == rests


def test_each_flag_moves_its_own_part():
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    for param, states in itertools.product([False, True], repeat=2):
        group = "actor_rollout_ref.actor.fsdp_config"
        config = compose_config([*required, f"{group}.param_offload={param}", f"{group}.optimizer_offload={states}"])
        module, optimizer, _ = trained(offload=False)
        build_offloader(module, optimizer, config.actor_rollout_ref.actor.fsdp_config, "cuda").rest()
        assert (module.head.weight.untyped_storage().nbytes() == 0) == param
        assert (optimizer.state[module.head.weight]["exp_avg"].untyped_storage().nbytes() == 0) == states


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_sharded_model_really_gives_its_memory_back(tmp_path):
    torch.multiprocessing.spawn(offload_on_a_gpu.run, args=(1, tmp_path), nprocs=1)
    seen = torch.load(tmp_path / "seen.pt")
    assert same(seen["plain"]["weights"], seen["offloaded"]["weights"])
    # 8 layers of 1024 x 1024 in fp32 are 32 MiB, their moments 64 MiB.
    assert seen["plain"]["resting"] >= 96 * 2**20
    assert seen["offloaded"]["resting"] < 2**20
    assert seen["offloaded"]["pinned"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_gigabyte_goes_out_and_comes_back():
    tensors = [torch.randn(2**24, device="cuda") for _ in range(16)]
    sums = [t.double().sum().item() for t in tensors]
    copy = HostCopy(lambda: tensors)
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        copy.to_host()
        assert torch.cuda.memory_reserved() <= before - 2**30
        copy.to_device()
    assert [t.double().sum().item() for t in tensors] == sums
