"""Ray ends a rank before the kernel would, when it takes the machine's memory for full: here, at one percent of it."""

from __future__ import annotations

import re

import pytest

from tests.faults.runs import trainer

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


def test_the_last_line_says_which_rank_died_where_and_what_takes_less(folder, tmp_path):
    settings = {"RAY_memory_monitor_refresh_ms": "200", "RAY_memory_usage_threshold": "0.01"}
    run = trainer(folder, tmp_path / "run", "stage=seqkd", **settings)
    try:
        assert run.end() == 1, run.log.read_text()
        assert run.left_behind(10) == []
    finally:
        run.stop()
    last = run.log.read_text().strip().splitlines()[-1]
    assert re.match(r"actor_rollout rank 0 of 1 died in \w+\. Where a process ends without .* use fewer ranks", last)
