"""A CPU as a device of upstream verl's, through the registry that it has for devices it does not know.

Upstream trains on GPUs. With this its SFT runs on CPU, with gloo: enough to see that a command is understood and that
its metrics are read, and nothing more.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

_init_process_group = torch.distributed.init_process_group


def _init_with_gloo(backend: str | None = None, **arguments: Any) -> None:
    """For a device named `cpu` upstream names two backends of one device, gloo both times, which torch refuses."""
    _init_process_group("gloo", **arguments)


torch.distributed.init_process_group = _init_with_gloo


def _nothing(*_: object, **__: object) -> int:
    return 0


CPU = SimpleNamespace(
    is_available=lambda: True,
    get_device_name=lambda *_: "cpu",
    mem_get_info=lambda *_: (0, 0),
    **{
        name: _nothing
        for name in (
            *("set_device", "current_device", "synchronize", "empty_cache", "reset_peak_memory_stats"),
            *("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"),
        )
    },
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One device, whose memory nobody counts."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CPU

    def is_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def nvtx_range(self, msg: str) -> nullcontext:
        return nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass
