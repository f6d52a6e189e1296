"""Where the time of one step goes on the device: kernels by name and by kind, and the time when none ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.utils.profiling import NAME_WIDTH, SHOWN_OPERATIONS, Trace


def profile(device: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Trace one call, and print what it was made of.

    Returns:
        `seconds` of the call under the profiler; `kinds`, the seconds of each kind and `idle`, when no kernel ran; and
        `kernels`, those that took longest. On CPU, `kernels` alone, of operators.
    """
    with Trace(device, host=False) as trace:
        work()
    found = trace.breakdown()
    print(f"\n{found.text()}\n", flush=True)
    longest = [one._asdict() | {"name": one.name[:NAME_WIDTH]} for one in found.operations[:SHOWN_OPERATIONS]]
    return {"seconds": found.seconds, "kinds": found.kinds, "kernels": longest}
