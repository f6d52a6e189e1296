"""Whether there are GPUs, told without torch where that is possible: loading it takes seconds."""

from __future__ import annotations

import ctypes
import runpy
import sys
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def sees_cuda() -> bool:
    """What `torch.cuda.is_available()` says. It is asked itself where it is loaded already, and where neither its build
    nor NVIDIA's driver settles it."""
    settled = None if "torch" in sys.modules else _settled()
    if settled is not None:
        return settled
    import torch

    return torch.cuda.is_available()


@cache
def _settled() -> bool | None:
    """None: not without torch, one that is built for AMD for instance, or for a later CUDA than the driver's."""
    build = _build()
    if build is None or build.get("hip"):
        return None
    if not build["cuda"]:
        return False
    version, devices = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        counted = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(devices)) == 0
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return False if sys.platform == "linux" else None
    if not counted or not devices.value:
        return False
    # 12080 is 12.8; within a major version an older driver will do.
    return True if version.value // 1000 >= int(build["cuda"].split(".")[0]) else None


def _build() -> dict[str, str | None] | None:
    """What torch's version.py says: for which CUDA it was built, if for one."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    with suppress(OSError):
        found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
        return found if "cuda" in found else None
    return None
