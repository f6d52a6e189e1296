"""Where the time of some work goes: a trace for Perfetto or Chrome, kernels by name and by kind, and the time when none
ran. Used by `trainer.profile_steps` and by the benchmarks."""

from __future__ import annotations

import gzip
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from verl.utils.console import shorten, table

logger = logging.getLogger(__name__)

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
SHOWN_OPERATIONS = 15
NAME_WIDTH = 90
# Of a trace's gigabytes most are repetitions: a higher level takes twice as long for a tenth less.
GZIP_LEVEL = 5
# Whether a trace is being made in this process, which can make one at a time.
_tracing = False


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


def marked(name: str) -> AbstractContextManager[object]:
    """Name the block in the trace that is being made; where none is made, nothing happens."""
    return record_function(name) if _tracing else nullcontext()


class Operation(NamedTuple):
    """All runs of one kernel or, on CPU, of one operator; an operator's seconds are those without what it calls."""

    name: str
    kind: str | None
    seconds: float
    calls: int


@dataclass(frozen=True)
class Breakdown:
    """What a stretch of work was made of.

    Args:
        seconds: of the whole, under the profiler.
        kinds: seconds of each kind of kernel, and `idle`, when no kernel ran; empty on CPU. They add up to more than
            the whole where streams overlap.
        operations: all, the longest first.
    """

    seconds: float
    kinds: dict[str, float]
    operations: list[Operation]

    def text(self, shown: int = SHOWN_OPERATIONS) -> str:
        """Tables of the kinds and of so many operations."""
        parts = []
        if self.kinds:
            kinds = sorted(self.kinds.items(), key=lambda item: -item[1])
            rows = [[kind, f"{seconds:.4f}", f"{seconds / self.seconds:.1%}"] for kind, seconds in kinds]
            parts.append(table([["kind", "seconds", "share"], *rows]))
        rows = [
            [shorten(one.name, NAME_WIDTH), one.kind or "operator", f"{one.seconds:.4f}", str(one.calls)]
            for one in self.operations[:shown]
        ]
        parts.append(table([["name", "kind", "seconds", "calls"], *rows], left=2))
        return "\n\n".join(parts)


class Trace:
    """A trace of what this thread does within the `with` block, and of the GPU's kernels.

    Args:
        device: what the process works on, `cpu` or a CUDA device.
        host: whether operators and waiting on the host are traced where there is a GPU; they take time themselves.

    Raises:
        RuntimeError: another trace is being made in this process.
    """

    def __init__(self, device: str, host: bool = True):
        self._on_gpu = device.startswith("cuda")
        activities = [ProfilerActivity.CUDA] if self._on_gpu else []
        if host or not self._on_gpu:
            activities.append(ProfilerActivity.CPU)
        self._profiler = torch_profile(activities=activities)
        self._start = self._seconds = 0.0

    def __enter__(self) -> Trace:
        global _tracing
        if _tracing:
            raise RuntimeError("a trace is being made in this process already: end it before another begins")
        self._synchronize()
        self._profiler.start()
        _tracing = True
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        global _tracing
        _tracing = False
        if error[0] is None:
            # Of a GPU that has failed nothing more can be asked.
            self._synchronize()
        self._seconds = time.perf_counter() - self._start
        self._profiler.stop()

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def breakdown(self) -> Breakdown:
        """Seconds by kind and by operation."""
        if self._on_gpu:
            return self._kernels()
        averages = self._profiler.key_averages()
        return Breakdown(
            self._seconds,
            {},
            _longest_first(Operation(one.key, None, one.self_cpu_time_total / 1e6, one.count) for one in averages),
        )

    def _kernels(self) -> Breakdown:
        times: dict[str, list[float]] = defaultdict(list)
        intervals = []
        for name, start, end in self.ran_on(DeviceType.CUDA):
            times[name].append(end - start)
            intervals.append((start, end))
        operations = [Operation(name, kind_of(name), sum(runs), len(runs)) for name, runs in times.items()]
        kinds: dict[str, float] = defaultdict(float)
        for operation in operations:
            kinds[operation.kind] += operation.seconds
        kinds["idle"] = self._seconds - busy_seconds(intervals)
        return Breakdown(self._seconds, dict(kinds), _longest_first(operations))

    def ran_on(self, device: DeviceType) -> Iterator[tuple[str, float, float]]:
        """Name, start and end, in seconds since the trace began, of all that ran there, marked blocks apart.

        Asked of what lies beneath `torch.profiler.profile.events`, which makes a tree of all that the host did as well,
        at 28 times the time.
        """
        traced = self._profiler.profiler.kineto_results
        begun = traced.trace_start_ns()
        for event in traced.events():
            if event.device_type() == device and not event.is_user_annotation():
                start = event.start_ns() - begun
                yield event.name(), start / 1e9, (start + event.duration_ns()) / 1e9

    def keep(self, folder: Path, file: str, process: str) -> None:
        """`write`, or say what kept it from that, such as a full disk: the work that was traced is not to be lost."""
        try:
            self.write(folder, file, process)
        except OSError as error:
            logger.warning("the trace of %s is not kept in %s (%s)", process, folder, error)

    def write(self, folder: Path, file: str, process: str) -> None:
        """Write `{file}.json.gz`, the trace, and `{file}.txt`, the tables of all operations.

        Args:
            process: the name of this process in the trace.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as made:
            whole, packed = Path(made) / "trace.json", Path(made) / "trace.json.gz"
            self._profiler.export_chrome_trace(str(whole))
            with whole.open(encoding="utf-8") as lines, gzip.open(packed, "wt", GZIP_LEVEL, encoding="utf-8") as out:
                out.writelines(_named(lines, os.getpid(), process))
            os.replace(packed, folder / f"{file}.json.gz")
        made_of = self.breakdown()
        text = f"{process}: {made_of.seconds:.4f} s\n\n{made_of.text(len(made_of.operations))}\n"
        (folder / f"{file}.txt").write_text(text, encoding="utf-8")


def _longest_first(operations: Iterable[Operation]) -> list[Operation]:
    return sorted(operations, key=lambda one: -one.seconds)


def _named(lines: Iterable[str], pid: int, process: str) -> Iterator[str]:
    """The lines of a trace as torch writes it, a key to a line, with this name of the process, not the program's."""
    event = ""
    for line in lines:
        key, _, value = line.strip().partition(": ")
        if key == '"name"' and value.startswith('"process_name"'):
            event = "a process"
        elif event == "a process" and key == '"pid"':
            event = "this process" if value.rstrip(",") == str(pid) else ""
        elif event == "this process" and key == '"name"':
            line, event = line.replace(value.strip(), f'"{process}"'), ""
        yield line
