"""Ranks that share the tokens of their rows, over NCCL: what one process computes on the CPU, and in bf16, with the
flash kernels, compiled and not, as close to it as ranks with rows of their own come."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.gpu.shapes import language_model, mixed_rows
from tests.ranks import leave
from tests.workers import ulysses_ranks
from tests.workers.ulysses_ranks import log_probs_and_scores
from tests.workers.updates_setup import LOSSES, batch, settings, update
from verl.models.answer_models import PolicyModel
from verl.models.sequence_parallel import own_shard

pytestmark = pytest.mark.several_gpus

ALL = [(loss, "tokens") for loss in LOSSES]
SOME = [("gspo", "tokens"), ("sft", "tokens"), ("ranking", "tokens")]


@pytest.fixture(autouse=True)
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")


def test_fp32_updates_log_probs_and_scores_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(ulysses_ranks.run, args=(2, 2, ALL, tmp_path, "cuda"), nprocs=2)
    for loss, split in ALL:
        module, expected = update(loss, settings(loss), batch())
        result = torch.load(tmp_path / f"{loss}-{split}.pt", weights_only=True)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(
                result["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-4,
                msg=lambda m, what=(loss, name): f"{what}: {m}",
            )  # fmt: skip
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (loss, name)
    computed = torch.load(tmp_path / "computed.pt", weights_only=True)
    for name, value in log_probs_and_scores(batch()).items():
        torch.testing.assert_close(computed[name], value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_bf16_gradients_are_no_further_from_fp32_than_those_of_ranks_alone(compiled, tmp_path):
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
        arguments = (2, size, SOME, tmp_path / str(size), "cuda", "bfloat16", compiled)
        torch.multiprocessing.spawn(ulysses_ranks.run, args=arguments, nprocs=2)
    for loss, split in SOME:
        exact = {
            name: parameter.grad for name, parameter in update(loss, settings(loss), batch())[0].named_parameters()
        }
        alone, shared = (distance(tmp_path / str(size) / f"{loss}-{split}.pt", exact) for size in (1, 2))
        assert shared <= 1.5 * alone + 0.01, (loss, alone, shared)
        assert alone < 0.2, f"{loss}: rounding alone does not part them by {alone}"


def distance(file: Path, exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative to those in fp32."""
    gradients = torch.load(file, weights_only=True)["gradients"]
    error, size = (
        torch.stack([norm(name) for name in exact]).square().sum().sqrt().item()
        for norm in (lambda name: (gradients[name].float() - exact[name]).norm(), lambda name: exact[name].norm())
    )
    return error / size


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_real_head_sizes_give_the_log_probs_of_the_cpu(family, tmp_path):
    torch.multiprocessing.spawn(forward, args=(2, family, tmp_path), nprocs=2)
    rows = mixed_rows()
    with torch.no_grad():
        exact = PolicyModel(language_model(family))(rows)[0]
        alone = PolicyModel(language_model(family, torch.bfloat16)).to("cuda:0")(rows)[0].cpu()
    shared = torch.load(tmp_path / "log_probs.pt", weights_only=True)
    rounding = (alone - exact).abs().mean().item()
    assert (shared - exact).abs().mean().item() <= 1.2 * rounding + 1e-4


def forward(rank: int, ranks: int, family: str, folder: Path) -> None:
    """One rank: log-probs in bf16; rank 0 writes them."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    model = PolicyModel(language_model(family, torch.bfloat16)).to(f"cuda:{rank}")
    model.shard = own_shard(ranks)
    with torch.no_grad():
        log_probs = model(mixed_rows())[0].cpu()
    if rank == 0:
        torch.save(log_probs, folder / "log_probs.pt")
    leave()
