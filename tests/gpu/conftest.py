"""Tests that need CUDA devices: `pytest -m gpu tests/gpu`. Everything in this folder carries the mark.

With pytest-xdist (`-n 4`, not with `several_gpus`) every worker has a device of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def own_device(worker: str, visible: str | None, count: int) -> str:
    """The device of an xdist worker, "gw0" and so on, by its name in CUDA_VISIBLE_DEVICES."""
    devices = visible.split(",") if visible else [str(number) for number in range(count)]
    return devices[int(worker.removeprefix("gw")) % len(devices)]


def pytest_configure():
    """Before anything asks for a device."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), torch.cuda.device_count()
    if worker is not None and count:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_device(worker, os.environ.get("CUDA_VISIBLE_DEVICES"), count)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def cuda() -> torch.device:
    """The first GPU; asking for these tests on a machine without one is an error, not a reason to skip them."""
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs a CUDA device")
    return torch.device("cuda:0")
