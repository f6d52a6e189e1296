"""vLLM fails in the middle of a step: the run ends like any other, and its last line says whose engine it was."""

from __future__ import annotations

import sys

import pytest

from tests.faults.runs import Run, arguments
from tests.tiny import write_data
from tests.vllm.tiny_engine import write_tiny_models

pytestmark = [pytest.mark.vllm, pytest.mark.e2e, pytest.mark.distributed]

LAST = {
    "memory": "MemoryError: the vllm engine of rank 1 of 2 failed in generate_sequences: The machine's memory is full "
    "in generate: set actor_rollout_ref.rollout.gpu_memory_utilization=0.1",
    "error": "RuntimeError: the vllm engine of rank 1 of 2 failed in generate_sequences: AssertionError: block 7 is "
    "free and in use",
    "killed": "actor_rollout rank 1 of 2 died in generate_sequences. Where a process ends without a word of its own",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm")
    write_tiny_models(path)
    write_data(path / "train.jsonl", rows=18)
    return path


@pytest.mark.parametrize("way", LAST)
def test_an_engine_that_fails_in_the_second_step(folder, tmp_path, way):
    settings = arguments(
        folder, tmp_path / "run", "stage=gad", f"critic.model.path={folder}/critic", "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.enforce_eager=True",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.2", "trainer.total_training_steps=4",
    )  # fmt: skip
    command = [sys.executable, "-m", "tests.vllm.dying_engine", *settings]
    run = Run(command, tmp_path / "run.log", WAY_OF_THE_TESTS=way)
    try:
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    log = run.log.read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1, "the first step"
    assert LAST[way] in log.strip().splitlines()[-1], log
