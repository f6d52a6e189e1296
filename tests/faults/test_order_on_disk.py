"""In which order a save reaches the disk, as the kernel was asked for it (strace)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"


def traceable() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The run's folder, and what was asked for in it: ("fsync", path), ("rename", from, to), ("remove", path)."""
    if not traceable():
        pytest.skip("needs strace, and a kernel that lets it trace")
    folder = tmp_path_factory.mktemp("order") / "run"
    trace = folder.parent / "trace"
    command = [sys.executable, "-m", "tests.faults.saving_run", str(folder), "4", "1"]
    traced = ["strace", "-f", "-y", "-s", "4096", "-o", str(trace), "-e", f"trace={CALLS}", *command]
    subprocess.run(traced, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder, [call for line in whole_lines(trace.read_text()) if (call := parse(line, folder))]


def whole_lines(trace: str) -> Iterator[str]:
    """Calls of several threads that strace had to cut in two, put together where they ended."""
    begun = {}
    for line in trace.splitlines():
        thread = line.split()[0]
        if line.endswith(" <unfinished ...>"):
            begun[thread] = line.removesuffix(" <unfinished ...>")
        elif match := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)$", line):
            yield begun.pop(thread) + match[1]
        else:
            yield line


def parse(line: str, folder: Path) -> tuple[str, ...] | None:
    """A call that succeeded, with whole paths."""
    match = re.match(r"\d+ +(\w+)\((.*)\) *= 0$", line)
    if match is None or str(folder) not in line:
        return None
    name, arguments = match.groups()
    if name in ("fsync", "fdatasync"):
        return "fsync", re.search(r"<(.*)>", arguments)[1]
    # A path is relative to the open folder before it, if there is one.
    paths = [
        os.path.join(base, path) for base, path in re.findall(r'(?:\w+<([^>]*)>, )?"([^"]*)"', arguments)
    ]  # fmt: skip
    return ("rename", *paths) if name.startswith("rename") else ("remove", paths[0])


def test_each_is_on_disk_before_the_next(calls):
    folder, made = calls
    step = str(folder / "global_step_4")
    named = made.index(("rename", f"{step}.tmp", step))
    before = {call[1] for call in made[:named] if call[0] == "fsync"}
    written = {str(path).replace(step, f"{step}.tmp") for path in (folder / "global_step_4").rglob("*")}
    assert {path for path in written if not path.endswith("only_as_best.txt")} <= before, "files and folders"
    assert f"{step}.tmp" in before

    tracker = str(folder / "latest_checkpointed_iteration.txt")
    announced = tracker.replace(".txt", ".tmp")
    assert announced in before
    folder_synced = ("fsync", str(folder))
    tracked = made.index(("rename", announced, tracker), named)
    assert folder_synced in made[named:tracked], "the name, before the tracker"
    removed = next(
        number for number, call in enumerate(made)
        if number > named and ((call[0] == "remove" and "/global_step_" in call[1]) or call[-1].endswith(".pruned"))
    )  # fmt: skip
    assert folder_synced in made[tracked:removed], "the tracker, before anything older goes"


def test_best_is_on_disk_before_a_former_one_goes(calls):
    folder, made = calls
    switched = [n for n, call in enumerate(made) if call == ("rename", str(folder / "best.tmp"), str(folder / "best"))]
    assert len(switched) >= 2, "at least steps 1 and 2"
    for number in switched:
        later = made[number + 1 :]
        until = next((n for n, call in enumerate(later) if call[-1].endswith(".pruned")), len(later))
        assert ("fsync", str(folder)) in later[:until]


def test_no_moment_is_without_a_checkpoint(calls):
    """Whenever the power goes, one that has been synced with its name is there."""
    folder, made = calls
    named, there, durable = set(), set(), set()
    for call in made:
        if call[0] == "rename" and re.fullmatch(r"global_step_\d+", Path(call[2]).name):
            named.add(call[2])
        elif call == ("fsync", str(folder)):
            there |= named
            durable |= named
        elif call[0] == "rename" and Path(call[1]).parent == folder:
            there.discard(call[1])
            named.discard(call[1])
        elif call[0] == "rename" and call[2].endswith(".pruned"):
            there.discard(str(Path(call[1]).parent))
        assert there or not durable
    assert str(folder / "global_step_4") in there
