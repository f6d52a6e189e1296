"""What every benchmark shares: its command line, its clock, and its report as a table and as JSON."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES
from verl.models.shape import LIMITS, Limits

PACKAGES = ("torch", "transformers", "vllm", "trl")
ROOT = Path(__file__).parents[1]
STARTED = time.perf_counter()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take; the description is the script's docstring."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--shape", choices=list(SHAPES), default="1.5b", help="size of the model (default: 1.5b)")
    result.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=Path, help="write the results as JSON to this file, after every one of them")
    return result


def say(text: str) -> None:
    """A progress line with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def device_name(device: str) -> str:
    """The name that CUDA gives the device, or `cpu`."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def device_limits(device: str) -> Limits | None:
    """What the device can do, if its datasheet is known here."""
    return LIMITS.get(device_name(device))


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on; None where one is not installed."""

    def find(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: find(package) for package in PACKAGES}


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def synchronize(device: str) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], Any]) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure(device: str, work: Callable[[], Any], warmup: int, steps: int) -> dict[str, Any]:
    """Call `work` `warmup` + `steps` times; time and memory of the last `steps`.

    Returns:
        `seconds` (the median), `all_seconds`, `warmup_seconds`, and `peak_gib` of device memory, None on CPU.
    """
    warmup_seconds = [timed(device, work) for _ in range(warmup)]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(device, work) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "warmup_seconds": warmup_seconds,
        "peak_gib": peak,
    }


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next model starts with an empty device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Results


def format_value(value: Any) -> str:
    """Numbers to three or four digits, thousands with commas; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text, numbers to the right. A row without one of the columns shows a dash there; a column that
    no row has is left out."""
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    cells = [[format_value(row.get(name)) for name in columns] for row in rows]
    numeric = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        placed = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return "  ".join(placed).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


class Report:
    """The results of one run: said as they come, kept in the JSON file from the first one on, and a table at the end.

    Args:
        benchmark: its name.
        arguments: the parsed command line.
        columns: what the table shows, of what `add` was given.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace, columns: Sequence[str]):
        self.columns = columns
        self.path: Path | None = arguments.out
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        limits = device_limits(arguments.device)
        self.head = {
            "benchmark": benchmark,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(arguments.device),
            "limits": None if limits is None else vars(limits),
            "versions": installed_versions(),
            "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items()},
        }

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep a result, say it, and rewrite the file."""
        self.rows.append(row)
        say("  ".join(f"{name}={format_value(row[name])}" for name in self.columns if row.get(name) is not None))
        self.write()
        return row

    def write(self) -> None:
        """The JSON file with the results so far."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.head, "results": self.rows}, indent=2) + "\n")

    def finish(self) -> dict[str, Any]:
        """Print the table and write the file once more; returns what is in it.

        Raises:
            SystemExit: parts of the benchmark have failed.
        """
        self.write()
        where = "; ".join(f"{name} {number}" for name, number in self.head["versions"].items() if number)
        print(f"\n{self.head['benchmark']}, {self.head['arguments']['shape']}, {self.head['device']} ({where})\n")
        print(format_table(self.rows, self.columns), flush=True)
        if self.failures:
            sys.exit(f"these have failed, see above: {', '.join(self.failures)}")
        return {**self.head, "results": self.rows}


def in_processes(module: str, argv: Sequence[str] | None, option: str, values: Sequence[str], report: Report) -> None:
    """Run a benchmark once for each of the values of one of its options, each time in a process of its own, and add
    the results to the report.

    Args:
        argv: the command line of this process, None for `sys.argv`.

    A process that fails is noted in the report, with what it had found before.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    for value in values:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.json"
            done = subprocess.run([sys.executable, "-m", module, *given, option, value, "--out", str(out)], cwd=ROOT)
            for row in json.loads(out.read_text())["results"] if out.is_file() else []:
                report.add(**row)
            if done.returncode:
                report.failures.append(value)
