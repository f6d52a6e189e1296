"""Where the time of one step goes on the device: kernels by name and by kind, and the time when none ran."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.common import format_table, timed

# The first pattern that a kernel's name matches decides. Inductor names its kernels after all that it fused.
KINDS = (
    ("communication", r"nccl"),
    ("elementwise, norm", r"^triton_(poi|red|per)"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimizer", r"adam|multi_tensor_apply"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|^triton_(tem|mm)"),
    ("copies, casts", r"memcpy|memset|copy|CatArray|chunk_cat|split_with_sizes|fill"),
    ("elementwise, norm", r""),
)
SHOWN_KERNELS = 15
NAME_WIDTH = 90


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals, which may overlap on several streams."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def profile(device: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Trace one call.

    Returns:
        `seconds` of the call under the profiler; `kinds`, the seconds of each kind and `idle`, when no kernel ran; and
        `kernels`, those that took longest. On CPU, `kernels` alone, of operators.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch_profile(activities=[activity]) as trace:
        seconds = timed(device, work)
    if device == "cpu":
        operators = {entry.key: (entry.self_cpu_time_total / 1e6, entry.count) for entry in trace.key_averages()}
        return _shown({"seconds": seconds, "kinds": {}}, operators)
    kernels: dict[str, list[float]] = defaultdict(list)
    intervals = []
    for event in trace.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            kernels[event.name].append(end - start)
            intervals.append((start, end))
    kinds: dict[str, float] = defaultdict(float)
    for name, times in kernels.items():
        kinds[kind_of(name)] += sum(times)
    kinds["idle"] = seconds - busy_seconds(intervals)
    return _shown({"seconds": seconds, "kinds": dict(kinds)}, {n: (sum(t), len(t)) for n, t in kernels.items()})


def _shown(result: dict[str, Any], kernels: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """The result with its longest kernels; printed too."""
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS]
    result["kernels"] = [
        {"name": n[:NAME_WIDTH], "kind": kind_of(n), "seconds": s, "calls": c} for n, (s, c) in longest
    ]
    kinds = sorted(result["kinds"].items(), key=lambda item: -item[1])
    shares = [{"kind": k, "seconds": s, "share": s / result["seconds"]} for k, s in kinds]
    if shares:
        print("\n" + format_table(shares, ("kind", "seconds", "share")))
    print("\n" + format_table(result["kernels"], ("seconds", "calls", "kind", "name")) + "\n", flush=True)
    return result
