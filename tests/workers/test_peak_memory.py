"""`perf/max_memory_*`: what a step held at most, in whichever call, on whichever rank."""

from types import SimpleNamespace

import pytest
import torch

from verl.trainer.ppo.student import Student
from verl.workers.fsdp_workers import ActorRolloutRefWorker

GIB = 2**30


def worker_on(device: str) -> ActorRolloutRefWorker:
    worker = ActorRolloutRefWorker.__new__(ActorRolloutRefWorker)
    worker.device = device
    return worker


def test_peaks_are_since_the_last_call_and_without_the_engine(monkeypatch):
    held = {"allocated": 60 * GIB, "reserved": 62 * GIB}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: held["reserved"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: held.update(allocated=20 * GIB, reserved=30 * GIB)
    )
    monkeypatch.setattr(ActorRolloutRefWorker, "engine_bytes", 12 * GIB)
    worker = worker_on("cuda:0")
    assert worker.peak_memory() == {"perf/max_memory_allocated_gb": 48, "perf/max_memory_reserved_gb": 50}
    assert worker.peak_memory() == {"perf/max_memory_allocated_gb": 8, "perf/max_memory_reserved_gb": 18}


def test_a_cpu_has_no_peaks():
    assert worker_on("cpu").peak_memory() == {}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        (
            [{"allocated": 3.0, "reserved": 9.0}, {"allocated": 5.0, "reserved": 8.0}],
            {"allocated": 5.0, "reserved": 9.0},
        ),
        ([{}, {}], {}),
    ],
)
def test_of_all_ranks_the_largest_is_logged(reports, expected):
    student = Student.__new__(Student)
    student.workers = SimpleNamespace(peak_memory=lambda: reports)
    assert student.peak_memory() == expected
