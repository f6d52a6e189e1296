"""Which of the ranks' lines reach the driver's log. Batches as Ray has them; a real run is in tests/faults."""

from __future__ import annotations

import logging

import pytest

from verl.single_controller.ray.output import RankOutput


def batch(rank: int | None, *lines: str, **more) -> dict:
    who = {"pid": "raylet"} if rank is None else {"pid": 7, "actor_name": f"actor_rollout[rank {rank}]"}
    return who | {"lines": list(lines), "is_err": True} | more


@pytest.fixture
def output(tmp_path):
    return RankOutput(tmp_path / "ranks.log")


def test_what_ranks_print_goes_to_the_file_alone(output, caplog):
    with caplog.at_level(logging.INFO):
        output(batch(1, "INFO 11-28 engine: graphs", "  5%|#    | 1/20\r100%|#####| 20/20\r", "UserWarning: \x1b[2J"))
    assert caplog.records == []
    assert output.file.read_text() == (
        "actor_rollout[rank 1]: INFO 11-28 engine: graphs\n"
        "actor_rollout[rank 1]: 100%|#####| 20/20\n"
        "actor_rollout[rank 1]: UserWarning: \ufffd[2J\n"
    )


def test_what_this_package_logs_there_is_logged_here(output, caplog):
    with caplog.at_level(logging.INFO):
        output(batch(1, "INFO verl.models: loading ..."))
        output(batch(0, "INFO verl.models: loading ..."))
        output(batch(1, "WARNING verl.workers: odd", "\tand its second line", "\tthird", "printed"))
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("verl.models", "INFO", "loading ..."),
        ("verl.workers", "WARNING", "actor_rollout[rank 1]: odd"),
        ("verl.workers", "WARNING", "actor_rollout[rank 1]: \tand its second line"),
        ("verl.workers", "WARNING", "actor_rollout[rank 1]: \tthird"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "ERROR 11-28 10:00:00 [core.py:700] EngineCore failed",
        "\x1b[0;36m(EngineCore pid=7)\x1b[0;0m ERROR 11-28 failed",
        "Fatal Python error: Segmentation fault",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "*** SIGSEGV received at time=1 on cpu 0 ***",
        "torch.OutOfMemoryError: CUDA out of memory",
    ],
)
def test_last_words_are_shown(output, caplog, line):
    output(batch(3, line))
    plain = line.replace("\x1b[0;36m", "").replace("\x1b[0;0m", "")
    assert [record.getMessage() for record in caplog.records] == [f"actor_rollout[rank 3]: {plain}"]


def test_a_spare_process_of_rays_may_die(output, caplog):
    """Seen on a busy machine: its lock breaks while it starts, and the run goes on with another one."""
    output({"pid": 3894, "lines": ["*** SIGABRT received at time=1 on cpu 0 ***", "Fatal Python error: Aborted"]})
    assert caplog.records == [] and output.file.read_text().startswith("3894: *** SIGABRT")


def test_what_all_ranks_say_is_shown_once(output, caplog):
    for rank in range(4):
        output(batch(rank, "WARNING verl.workers: odd"))
    assert len(caplog.records) == 1
    assert output.file.read_text().count("odd") == 4


def test_rays_daemons(output, caplog):
    output(batch(None, "1 worker was killed due to memory pressure"))
    output({"pid": "autoscaler", "lines": ["Autoscaler status", "ERROR"]})
    assert [record.getMessage() for record in caplog.records] == ["raylet: 1 worker was killed due to memory pressure"]


def test_a_file_that_cannot_be_written_keeps_nothing_from_the_log(tmp_path, caplog):
    RankOutput(tmp_path / "missing" / "ranks.log")(batch(0, "ERROR there"))
    assert len(caplog.records) == 1
