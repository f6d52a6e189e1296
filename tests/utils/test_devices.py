"""Whether there are GPUs: as torch says, asked or not."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verl.utils import devices

CUDA_13 = {"cuda": "13.0", "hip": None}


class Driver:
    """NVIDIA's, with so many devices and of that version."""

    def __init__(self, count: int, version: int, status: int = 0):
        self.count, self.version, self.status = count, version, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, place):
        place._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, place):
        place._obj.value = self.version
        return 0


@pytest.fixture
def settled(monkeypatch):
    """`settled(build, driver)`: what can be told without torch."""

    def told(build, driver):
        def load(name):
            if driver is None:
                raise OSError(name)
            return driver

        monkeypatch.setattr(devices, "_build", lambda: build)
        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(sys, "platform", "linux")
        return devices._settled.__wrapped__()

    return told


@pytest.mark.parametrize(
    ("build", "driver", "expected"),
    [
        (CUDA_13, Driver(2, 13000), True),
        (CUDA_13, Driver(2, 13020), True),
        ({"cuda": "12.8", "hip": None}, Driver(1, 12020), True),
        ({"cuda": "12.8", "hip": None}, Driver(1, 13000), True),
        (CUDA_13, Driver(0, 13000), False),  # CUDA_VISIBLE_DEVICES=
        (CUDA_13, Driver(2, 13000, status=100), False),  # the driver's library without a device
        (CUDA_13, None, False),
        ({"cuda": None, "hip": None}, Driver(2, 13000), False),
        (CUDA_13, Driver(2, 12080), None),
        ({"cuda": None, "hip": "6.4"}, None, None),
        (None, Driver(2, 13000), None),
    ],
)
def test_what_can_be_told_without_torch(settled, build, driver, expected):
    assert settled(build, driver) is expected


def test_torch_is_asked_where_it_is_loaded_or_nothing_else_knows(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=answer: answer)
        assert devices.sees_cuda() is answer


def test_here_both_say_the_same():
    code = "import sys; from verl.utils.devices import sees_cuda as sees; print(sees(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    said, loaded = done.stdout.split()
    assert said == str(torch.cuda.is_available()), done.stderr
    # This torch says itself whether it was built for CUDA.
    assert devices._build() is not None and (loaded == "False" or torch.version.hip)
