"""Which files are read before somebody loads a model; that it is noted beside the other phases, and ends no start."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import write_model
from verl.models import reading_ahead
from verl.models.reading_ahead import files_of, read_ahead
from verl.utils import startup
from verl.utils.checkpoint.sharded import write_sharded

ALL = 1 << 40


@pytest.fixture
def passed_over(monkeypatch):
    """The names of the files that were read, in the order in which they were begun."""
    names = []
    read = reading_ahead._pass_over
    monkeypatch.setattr(reading_ahead, "AT_A_TIME", 1)
    monkeypatch.setattr(reading_ahead, "_pass_over", lambda file: (names.append(file.name), read(file)))
    return names


@pytest.fixture(autouse=True)
def record(monkeypatch):
    monkeypatch.setattr(startup, "_record", startup._Record())


def write_files(folder, sizes):
    """A Hugging Face folder whose weights are in several files of about so many bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, size in sizes.items():
        save_file({"x": torch.zeros(size, dtype=torch.uint8)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: n for n in sizes}}))
    return folder


def test_what_is_read_of_each_kind_of_folder(tmp_path):
    model = write_model(tmp_path / "model")
    assert files_of(model) == [model / "model.safetensors"]
    actor = tmp_path / "global_step_3" / "actor"
    shutil.copytree(model, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("model", "optim"):
        write_sharded({"x": torch.zeros(3)}, actor / part)
    assert [file.parent.name for file in files_of(actor)] == ["model"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    save_file({"x": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    assert files_of(adapter) == [model / "model.safetensors"]
    with pytest.raises(FileNotFoundError):
        files_of(tmp_path / "nothing")


def test_a_file_of_two_models_is_read_once_and_whole(tmp_path, passed_over):
    student = write_files(tmp_path / "student", {"a.safetensors": 5, "b.safetensors": 7})
    critic = tmp_path / "critic"
    critic.mkdir()
    for file in student.iterdir():
        (critic / file.name).symlink_to(file)
    read_ahead([student, critic, student], ALL).wait()
    assert passed_over == ["a.safetensors", "b.safetensors"]
    (phase,) = startup.phases()
    assert (phase.what, phase.depth, phase.beside) == ("reading the models' files", 0, True)


def test_every_byte_is_asked_of_the_system(tmp_path, monkeypatch):
    asked = []

    class Stream:
        def __init__(self, file):
            self.stream = file.__class__.open(file, "rb", buffering=0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def readinto(self, chunk):
            asked.append(self.stream.readinto(chunk))
            return asked[-1]

    monkeypatch.setattr(reading_ahead, "CHUNK_BYTES", 4)
    file = tmp_path / "weights"
    file.write_bytes(b"ten bytes.")
    path = type("Opened", (), {"open": lambda self, mode, buffering: Stream(file)})()
    reading_ahead._pass_over(path)
    assert asked == [4, 4, 2, 0]


def test_no_more_than_memory_has_room_for(tmp_path, passed_over):
    folder = write_files(tmp_path / "model", {"a.safetensors": 1000, "b.safetensors": 5000, "c.safetensors": 1000})
    # Every file has a header of some tens of bytes: a (1000) fits, b does not, and nothing after it.
    read_ahead([folder], 2500).wait()
    assert passed_over == ["a.safetensors"]


def test_a_folder_that_cannot_be_read_is_for_who_loads_it(tmp_path, caplog, passed_over):
    with caplog.at_level(logging.INFO):
        read_ahead([tmp_path / "nothing"], ALL).wait()
    assert "are not read ahead" in caplog.text and passed_over == []
