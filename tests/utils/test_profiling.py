"""Traces and their tables: arithmetic by hand, and a trace of known work."""

import gzip
import json

import pytest
import torch
from torch.autograd import DeviceType

from verl.utils import profiling
from verl.utils.profiling import Breakdown, Operation, Trace, marked


def work():
    with marked("three products"):
        for _ in range(3):
            torch.mm(torch.ones(4, 5), torch.ones(5, 6))


def test_a_trace_counts_operators_and_knows_marked_blocks():
    with Trace("cpu") as trace:
        work()
    found = trace.breakdown()
    calls = {one.name: one.calls for one in found.operations}
    assert calls["aten::mm"] == 3 and calls["three products"] == 1
    assert found.kinds == {}
    seconds = [one.seconds for one in found.operations]
    assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) <= found.seconds


def test_what_ran_on_a_device_is_what_torch_says_of_it():
    """On the CPU, in the place of a GPU."""
    with Trace("cpu") as trace, marked("a block"):
        torch.ones(64, 64) @ torch.ones(64, 64)
    seen = sorted(trace.ran_on(DeviceType.CPU))
    said = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in trace._profiler.events()
        if event.device_type == DeviceType.CPU and not event.is_user_annotation
    ]
    assert {"aten::ones", "aten::mm"} <= {name for name, _, _ in seen}
    assert [name for name, _, _ in seen] == [name for name, _, _ in sorted(said)]
    for one, other in zip(seen, sorted(said), strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=1e-9)


def test_files_name_the_process_and_hold_every_operation(tmp_path):
    with Trace("cpu") as trace:
        work()
    trace.write(tmp_path / "step_3", "rank_1", "rank 1 of 2")
    assert sorted(file.name for file in (tmp_path / "step_3").iterdir()) == ["rank_1.json.gz", "rank_1.txt"]
    with gzip.open(tmp_path / "step_3" / "rank_1.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert "rank 1 of 2" in named
    assert sum(event["name"] == "aten::mm" for event in events) == 3
    lines = (tmp_path / "step_3" / "rank_1.txt").read_text().splitlines()
    assert lines[0].startswith("rank 1 of 2: ")
    assert len(lines) == 3 + len(trace.breakdown().operations)


def test_only_one_trace_at_a_time_and_the_next_after_an_error():
    with Trace("cpu"), pytest.raises(RuntimeError, match="already"), Trace("cpu"):
        pass
    with pytest.raises(ZeroDivisionError), Trace("cpu"):
        raise ZeroDivisionError
    with Trace("cpu") as trace:
        work()
    assert any(one.name == "aten::mm" for one in trace.breakdown().operations)


def test_marking_costs_nothing_where_no_trace_is_made(monkeypatch):
    monkeypatch.setattr(profiling, "record_function", None)  # Calling it would fail.
    work()


def test_tables_by_hand():
    operations = [Operation("nvjet_tst", "gemm", 0.5, 7), Operation("flash_fwd", "attention", 0.25, 2)]
    found = Breakdown(2.0, {"gemm": 0.5, "attention": 0.25, "idle": 1.25}, operations)
    assert found.text(shown=1).splitlines() == [
        "kind       seconds  share",
        "idle        1.2500  62.5%",
        "gemm        0.5000  25.0%",
        "attention   0.2500  12.5%",
        "",
        "name       kind  seconds  calls",
        "nvjet_tst  gemm   0.5000      7",
    ]
