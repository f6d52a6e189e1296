"""Host memory that a GPU copies into: what taking it costs, once in a run, and what a copy of it takes then.

    python -m benchmarks.host_memory --gib 8 --out host_memory.json

`ours` is `verl.utils.host_memory.host_buffer`, which background saves and offloading take their memory from; `plain`
asks the system for the same and registers it, so that CUDA's driver takes it page by page. `take` is the time until
it can be used, `copy` that of filling it from the device. On CPU nothing is registered, and `plain` takes its pages
within the copy. The shape has no meaning here.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common import Report, parser, timed
from verl.utils.host_memory import host_buffer
from verl.utils.units import GIB

COLUMNS = ("way", "gib", "take", "copy", "of_plain")
# Bytes of the device that are copied at a time.
PART = 2**28


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--gib", type=float, default=8, help="how much (default: 8)")
    result.add_argument("--times", type=int, default=3, help="each; medians are told (default: 3)")
    return result


def plain_buffer(size: int, pinned: bool) -> torch.Tensor:
    """As `host_buffer`, whatever pages come, when they come; registered until the process ends."""
    buffer = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    if pinned:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    return buffer


def measure_once(device: str, size: int, take: Callable[[int, bool], torch.Tensor]) -> dict[str, float]:
    """Seconds of taking `size` bytes and of filling them."""
    buffers: list[torch.Tensor] = []
    taken = timed(device, lambda: buffers.append(take(size, device == "cuda")))
    (buffer,) = buffers
    filling = torch.ones(min(size, PART), dtype=torch.uint8, device=device)

    def copy() -> None:
        for part in buffer.split(PART):
            part.copy_(filling[: len(part)], non_blocking=True)

    copied = timed(device, copy)
    if take is plain_buffer and device == "cuda":
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
    return {"take": taken, "copy": copied}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    report = Report("host_memory", args, COLUMNS)
    size = int(args.gib * GIB)
    together: dict[str, float] = {}
    for way, take in (("plain", plain_buffer), ("ours", host_buffer)):
        seconds = [measure_once(args.device, size, take) for _ in range(args.times)]
        row = {what: median(one[what] for one in seconds) for what in ("take", "copy")}
        together[way] = sum(row.values())
        report.add(way=way, gib=args.gib, **row, of_plain=together[way] / together["plain"])
    return report.finish()


if __name__ == "__main__":
    main()
