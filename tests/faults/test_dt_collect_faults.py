"""Collect is killed, told to end, and left without room: no answer is lost, and none is paid for twice."""

import os
import signal
import time
from collections import Counter

import pytest

from tests.data_tools.teaching import command, files_with_the_key, read_lines, rows_of, start, teaching, write_prompts
from tests.faults.small_disk import small_disk

pytestmark = pytest.mark.faults


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert files_with_the_key(tmp_path) == []


def collect(arguments):
    """To its end; returns the exit code and what it said."""
    process = start(arguments)
    out, error = process.communicate(timeout=300)
    return process.returncode, out + error


def wait_for(teacher, count, kind="answered"):
    until = time.monotonic() + 120
    while len(teacher.lines(kind)) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_it_goes_on(folder):
    """At most the requests under way at each kill are asked for again; no answer in the log ever is."""
    prompts, out = write_prompts(folder / "p.txt", 120), folder / "t.parquet"
    with teaching(folder, delay=0.05, at_random=[0.1, 1, 500, "hang up"]) as teacher:
        arguments, kills = command(prompts, out, teacher.url, "--concurrency", "4"), 3
        for kill in range(kills):
            process = start(arguments)
            wait_for(teacher, 25 * (kill + 1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kept = {line["key"] for line in read_lines(folder / "t.collect" / "log.jsonl")[1:]}
            assert len(kept) >= len(set(teacher.texts())) - 4
        process = start(arguments)
        said = process.communicate()[0]
        assert process.returncode == 0 and "120 of 120 wanted" in said
        answered = Counter(teacher.texts())
    assert len(answered) == 120 and sum(answered.values()) <= 120 + 4 * kills
    assert len(rows_of(out)) == 120 == len(read_lines(folder / "t.collect" / "log.jsonl")) - 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_is_under_way(folder, number):
    prompts, out = write_prompts(folder / "p.txt", 60), folder / "t.parquet"
    with teaching(folder, delay=0.4) as teacher:
        arguments = command(prompts, out, teacher.url, "--concurrency", "4")
        process = start(arguments)
        wait_for(teacher, 6, "began")
        process.send_signal(number)
        said, error = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "waiting for the answers under way" in error and "run the same command again" in error
        answered, rows = len(teacher.texts()), len(rows_of(out))
        # All that was answered is there, with those that were under way.
        assert 6 <= answered == rows < 60 and f"{rows} of 60 wanted" in said
        assert len(teacher.lines("began")) == answered and not (folder / "t.collect" / "room").exists()
        assert collect(arguments)[0] == 0 and sorted(Counter(teacher.texts()).values()) == [1] * 60


def test_a_second_signal_ends_it_at_once(folder):
    prompts, out = write_prompts(folder / "p.txt", 60), folder / "t.parquet"
    with teaching(folder, by_text={"number 9?": "drip"}, delay=0.01) as teacher:
        process = start(command(prompts, out, teacher.url, "--concurrency", "4", "--timeout", "60"))
        wait_for(teacher, 30)
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=3)
        assert process.returncode == 130
        kept = len(read_lines(folder / "t.collect" / "log.jsonl")) - 1
        assert len(teacher.texts()) - 4 <= kept <= len(teacher.texts())


@pytest.fixture
def disk(folder):
    """A folder with room for 2 MiB."""
    with small_disk(folder / "disk", "2m") as place:
        yield place


def test_a_full_disk_loses_no_answer(folder, disk):
    prompts, out = write_prompts(folder / "p.txt", 80), disk / "t.parquet"
    with teaching(folder, delay=0.02) as teacher:
        arguments = command(prompts, out, teacher.url, "--concurrency", "4")
        process = start(arguments)
        wait_for(teacher, 10)
        filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(filler, b"x" * 512)
        os.close(filler)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2, error
        assert "no room is left on the disk" in error and "run the same command again" in error
        assert "that found no room" not in error
        answered = len(teacher.texts())
        assert 10 <= answered < 80 and answered == len(read_lines(disk / "t.collect" / "log.jsonl")) - 1
        # As long as it is full nothing is asked.
        (disk / "filler").write_bytes(b"")
        filler = os.open(disk / "filler", os.O_WRONLY)
        os.posix_fallocate(filler, 0, os.statvfs(disk).f_bavail * 4096 - (1 << 19))
        os.close(filler)
        code, said = collect(arguments)
        assert code == 2 and "expected room for the answers under way, 1 MiB, got a full disk" in said
        assert len(teacher.texts()) == answered
        (disk / "filler").unlink()
        assert collect(arguments)[0] == 0
        assert sorted(Counter(teacher.texts()).values()) == [1] * 80
        assert len(rows_of(out)) == 80
        # Without room for the rows, what has been written stays, and nothing is asked.
        filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(filler, 0, os.statvfs(disk).f_bavail * 4096)
        os.close(filler)
        code, said = collect(arguments)
        assert code == 2 and f"{out}: expected to write it, got" in said and "No space left" in said
        assert len(rows_of(out)) == 80 == len(teacher.texts())


def test_two_at_once_are_refused(folder):
    prompts, out = write_prompts(folder / "p.txt", 40), folder / "t.parquet"
    with teaching(folder, delay=0.3) as teacher:
        arguments = command(prompts, out, teacher.url, "--concurrency", "2")
        process = start(arguments)
        wait_for(teacher, 2)
        code, said = collect(arguments)
        assert code == 2 and "no other collect at work" in said
        process.kill()
        process.communicate()
