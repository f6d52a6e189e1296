"""The log alone: what is on the disk when an answer counts, and what a write that fails half-way leaves."""

import errno
import json
import os

import pytest

from verl.data_tools.collect import log as log_module
from verl.data_tools.collect.log import AnswerLog

SETTINGS = {"model": "m"}


def record(name: str, text: str = "答案") -> dict:
    return {"key": name, "answer": text}


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_an_answer_is_synced_before_it_is_in_the_log(tmp_path, monkeypatch):
    log, synced = AnswerLog(tmp_path, SETTINGS), []
    real = log_module.sync_to_disk

    def sync(path):
        real(path)
        synced.append((path, path.stat().st_size, len(log)))

    monkeypatch.setattr(log_module, "sync_to_disk", sync)
    log.append([record("a"), record("b")])
    log.append([record("c")])
    sizes = [0]
    for line in log.path.read_bytes().splitlines(keepends=True):
        sizes.append(sizes[-1] + len(line))
    # The head, then two answers of which none is in the log yet, then the third.
    assert synced == [(log.path, sizes[3], 0), (log.path, sizes[4], 2)]
    assert [found["key"] for found in log.records()] == ["a", "b", "c"]
    log.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_half_way_leaves_no_trace(tmp_path, monkeypatch, number):
    log = AnswerLog(tmp_path, SETTINGS)
    log.make_room(2)
    assert (tmp_path / "room").stat().st_size == 2 << 18
    log.append([record("a")])
    before, write = log.path.read_bytes(), os.write

    def once(file, data):
        monkeypatch.setattr(log_module.os, "write", write)
        write(file, data[:10])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(log_module.os, "write", once)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            log.append([record("b")])
        assert log.path.read_bytes() == before and not log.full
    else:
        # The room beside it is given up for what has come.
        log.append([record("b")])
        assert log.full and not (tmp_path / "room").exists()
        assert [line.get("key") for line in lines(log.path)] == [None, "a", "b"]
    before = log.path.read_bytes()
    monkeypatch.setattr(log_module.os, "write", once)
    if log.full:
        with pytest.raises(OSError, match=r"left|quota"):
            log.append([record("c")])
        assert log.path.read_bytes() == before and "c" not in log
    monkeypatch.setattr(log_module.os, "write", write)
    log.close()


def test_a_log_without_an_answer_takes_other_settings(tmp_path):
    AnswerLog(tmp_path, SETTINGS).close()
    log = AnswerLog(tmp_path, {"model": "other"})
    log.append([record("a")])
    log.close()
    with pytest.raises(ValueError, match='model was "other", is "m"; name another --out'):
        AnswerLog(tmp_path, SETTINGS)
    assert [line.get("key") for line in lines(log.path)] == [None, "a"]


def test_a_log_behind_another_is_one_log(tmp_path):
    """cat b/log.jsonl >> a/log.jsonl: its first line, with the same settings, is no answer."""
    log = AnswerLog(tmp_path, SETTINGS)
    log.append([record("a")])
    log.close()
    head = log.path.read_bytes().splitlines(keepends=True)[0]
    with log.path.open("ab") as file:
        file.write(head + json.dumps(record("b")).encode() + b"\n")
    log = AnswerLog(tmp_path, SETTINGS)
    assert [found["key"] for found in log.records()] == ["a", "b"] and not log.damaged
    log.close()


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"mine": 1}\n{"key": "a"}\n')
    with pytest.raises(ValueError, match="expected a log of collect, got another file"):
        AnswerLog(tmp_path, SETTINGS)
    assert (tmp_path / "log.jsonl").read_text() == '{"mine": 1}\n{"key": "a"}\n'
