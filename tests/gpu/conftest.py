"""Tests that need CUDA devices: `pytest -m gpu tests/gpu`. Everything in this folder carries the mark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


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
