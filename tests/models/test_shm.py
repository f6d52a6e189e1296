"""Copies of model folders in shared memory: whole, fresh, one per machine."""

import logging
import multiprocessing
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import write_model
from verl.models import shm
from verl.models.loading import load_model
from verl.models.shm import copy_to_shm, model_folder
from verl.models.tokenizer import load_tokenizer
from verl.trainer.config import compose_config
from verl.utils.checkpoint.sharded import write_sharded


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "student")


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder, "policy").state_dict()


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def folders(root) -> list[Path]:
    (own,) = root.iterdir()
    return sorted(path for path in own.iterdir() if path.is_dir())


def test_the_copy_is_the_model(root, model):
    copy = copy_to_shm(model, root)
    assert root in copy.parents and copy.name.startswith("student-")
    assert_same_weights(copy, model)
    assert load_tokenizer(copy).get_vocab() == load_tokenizer(model).get_vocab()


def test_of_a_checkpoint_the_model_is_copied_and_the_optimizer_is_not(root, model, tmp_path):
    checkpoint = tmp_path / "global_step_3" / "actor"
    shutil.copytree(model, checkpoint / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {key: value for key, value in weights(model).items() if key != "lm_head.weight"}
    write_sharded(tensors, checkpoint / "model")
    write_sharded(tensors, checkpoint / "optim")
    copy = copy_to_shm(checkpoint, root)
    assert sorted(path.name for path in copy.iterdir()) == ["huggingface", "model"]
    assert_same_weights(copy, model)


def test_a_second_run_reuses_the_copy(root, model, caplog):
    with caplog.at_level(logging.INFO, "verl"):
        first = copy_to_shm(model, root)
        made = first.stat().st_ctime_ns
        assert "copying" in caplog.text and "copied" in caplog.text and " s" in caplog.records[-1].getMessage()
        caplog.clear()
        assert copy_to_shm(model, root) == first
    assert "from its copy" in caplog.text and "copying" not in caplog.text
    assert first.stat().st_ctime_ns == made


def test_the_same_folder_by_another_path_has_the_same_copy(root, model, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert copy_to_shm("link", root) == copy_to_shm(model, root) == copy_to_shm("./student", root)


def test_a_changed_folder_is_copied_anew_and_the_old_copy_goes(root, model, tmp_path):
    other = copy_to_shm(write_model(tmp_path / "other"), root)
    first = copy_to_shm(model, root)
    write_model(model, seed=7)
    second = copy_to_shm(model, root)
    assert second != first
    assert_same_weights(second, model)
    assert folders(root) == sorted([second, other])


def test_a_file_with_another_time_alone_counts_as_changed(root, model):
    first = copy_to_shm(model, root)
    os.utime(model / "config.json", ns=(1, 1))
    assert copy_to_shm(model, root) != first


def test_a_copy_that_was_broken_off_is_not_taken_for_one(root, model):
    whole = copy_to_shm(model, root)
    partial = whole.with_name(f"{whole.name}.partial")
    whole.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    copy = copy_to_shm(model, root)
    assert copy == whole and folders(root) == [whole]
    assert_same_weights(copy, model)


def test_a_copy_that_fails_leaves_nothing(root, model, monkeypatch):
    def fail(source, target):
        raise OSError("disk on fire")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk on fire"):
        copy_to_shm(model, root)
    assert folders(root) == []


def test_weights_that_nobody_reads_and_subfolders_stay_behind(root, model):
    (model / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"and once more")
    copy = copy_to_shm(model, root)
    assert {path.name for path in model.iterdir()} - {path.name for path in copy.iterdir()} == {
        "pytorch_model.bin",
        "original",
    }
    (model / "model.safetensors").unlink()
    assert (copy_to_shm(model, root) / "pytorch_model.bin").is_file()


def test_lack_of_room_is_said_before_anything_is_copied(root, model, tmp_path, monkeypatch):
    other = copy_to_shm(write_model(tmp_path / "other"), root)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**10, 2**10))
    with pytest.raises(OSError, match=r"needs 0\.0 GiB") as caught:
        copy_to_shm(model, root)
    message = str(caught.value)
    assert str(model) in message and "0.0 GiB free" in message and str(other) in message
    assert "--shm-size" in message and "use_shm=False" in message
    assert folders(root) == [other]


def test_a_folder_of_another_user_is_not_trusted(root, model, monkeypatch):
    (root / f"verl-{os.getuid()}").symlink_to(model)
    with pytest.raises(PermissionError, match="use_shm=False"):
        copy_to_shm(model, root)


def test_copies_are_for_their_user_alone(root, model):
    copy = copy_to_shm(model, root)
    assert copy.parent.stat().st_mode & 0o777 == 0o700


def _copy_slowly(model: Path, root: Path, log: Path) -> None:
    copyfile = shutil.copyfile

    def counted(source, target):
        with log.open("a") as file:
            file.write(f"{source}\n")
        return copyfile(source, target)

    shm.shutil.copyfile = counted
    assert_same_weights(copy_to_shm(model, root), model)


def test_several_processes_make_one_copy(root, model, tmp_path):
    log = tmp_path / "copied"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_copy_slowly, args=(model, root, log)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    copied = log.read_text().splitlines()
    assert sorted(copied) == sorted(str(file) for file in model.iterdir())


@pytest.mark.parametrize("key", ["actor_rollout_ref.model", "critic.model"])
def test_the_flag_decides(root, model, key):
    required = ["data.train_files=x", f"actor_rollout_ref.model.path={model}", "trainer.experiment_name=x"]
    config = compose_config([*required, f"{key}.use_shm=True"])
    for name, settings in (
        ("actor_rollout_ref.model", config.actor_rollout_ref.model),
        ("critic.model", config.critic.model),
    ):
        folder = model_folder(settings, root)
        assert folder == (str(copy_to_shm(model, root)) if name == key else str(model))
        assert model_folder(replace(settings, use_shm=False), root) == str(model)


def test_what_holds_no_model_is_not_copied(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        copy_to_shm(tmp_path / "empty", root)
