"""Settings of engines that need no engine to be tried."""

import dataclasses

import pytest

from tests.workers.updates_setup import settings
from verl.trainer.config import Config
from verl.trainer.config.checks import find_conflicts


def with_rollout(ranks: int = 1, **changes) -> Config:
    config = settings("gspo")
    rollout = dataclasses.replace(config.actor_rollout_ref.rollout, **changes)
    return dataclasses.replace(
        config,
        actor_rollout_ref=dataclasses.replace(config.actor_rollout_ref, rollout=rollout),
        trainer=dataclasses.replace(config.trainer, n_gpus_per_node=ranks),
    )


@pytest.mark.parametrize(
    ("name", "frees", "drops"),
    [("vllm", True, True), ("vllm", False, False), ("hf", True, False), ("hf", False, False)],
)
def test_only_vllm_drops_weights_and_only_when_told_to(name, frees, drops):
    assert with_rollout(name=name, free_cache_engine=frees).actor_rollout_ref.rollout.drops_weights is drops


@pytest.mark.parametrize(
    ("name", "size", "ranks", "problem"),
    [
        ("hf", 1, 4, None),
        ("hf", 2, 4, "tensor_model_parallel_size=2 is not supported with rollout.name=hf"),
        ("vllm", 1, 4, None),
        ("vllm", 2, 4, None),
        ("vllm", 4, 4, None),
        ("vllm", 3, 4, "tensor_model_parallel_size=3 does not divide trainer.n_gpus_per_node=4"),
        ("vllm", 8, 4, "tensor_model_parallel_size=8 does not divide trainer.n_gpus_per_node=4"),
    ],
)
def test_ranks_of_a_node_divide_into_engines(name, size, ranks, problem):
    found = find_conflicts(with_rollout(ranks, name=name, tensor_model_parallel_size=size))
    about_engines = [sentence for sentence in found if "tensor_model_parallel" in sentence]
    assert len(about_engines) == (problem is not None)
    assert problem is None or problem in about_engines[0]
