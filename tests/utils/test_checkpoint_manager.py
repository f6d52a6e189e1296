"""Checkpoint folders on a real disk: complete or absent, checked, pruned."""

import errno
import json
import os
import zlib
from pathlib import Path

import pytest

from verl.models.finding import find_model
from verl.utils.checkpoint.best_link import BEST, behind_best, best_step, point_best
from verl.utils.checkpoint.checkpoint_manager import (
    commit_checkpoint,
    find_latest_ckpt_path,
    get_checkpoint_tracker_filename,
    mark_only_as_best,
    prune_checkpoints,
    remove_former_bests,
    start_checkpoint,
    step_of,
    verify_checkpoint,
)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


FILES = {
    "actor/model/a.safetensors": b"weights",
    "actor/extra_state.json": b"{}",
    "critic/model/b.safetensors": b"scores",
    "trainer_state.json": b'{"step": 1}',
    "empty": b"",
}


def save(root, step, files=FILES):
    folder = start_checkpoint(root, step)
    write(folder, files)
    return commit_checkpoint(folder)


def names(root):
    return sorted(path.name for path in root.iterdir())


# ---- start and commit


def test_start_gives_an_empty_temporary_folder(tmp_path):
    folder = start_checkpoint(tmp_path / "run", 7)
    assert folder == tmp_path / "run" / "global_step_7.tmp"
    assert list(folder.iterdir()) == []


def test_start_removes_an_earlier_attempt(tmp_path):
    write(start_checkpoint(tmp_path, 7), {"actor/half.bin": b"x"})
    assert list(start_checkpoint(tmp_path, 7).iterdir()) == []


@pytest.mark.parametrize("suffix", [".tmp", "", ".old"])
@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_in_the_place_of_a_folder_goes_and_its_target_stays(tmp_path, suffix, target):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    (run / f"global_step_1{suffix}").symlink_to(tmp_path / target)
    if suffix == ".old":
        save(run, 1)
    save(run, 1)
    assert names(run) == ["global_step_1", "latest_checkpointed_iteration.txt"]
    assert not (run / "global_step_1").is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


@pytest.mark.parametrize("suffix", [".tmp", ""])
def test_a_file_in_the_place_of_a_folder_goes(tmp_path, suffix):
    (tmp_path / f"global_step_1{suffix}").touch()
    save(tmp_path, 1)
    assert names(tmp_path) == ["global_step_1", "latest_checkpointed_iteration.txt"]


def test_commit(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "global_step_7"
    assert names(tmp_path) == ["global_step_7", "latest_checkpointed_iteration.txt"]
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert get_checkpoint_tracker_filename(tmp_path) == str(tmp_path / "latest_checkpointed_iteration.txt")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums == {name: zlib.crc32(content) for name, content in FILES.items()}


def test_commit_replaces_the_same_step(tmp_path):
    save(tmp_path, 7)
    folder = save(tmp_path, 7, {"actor/new.bin": b"new"})
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "actor/new.bin",
        "checksums.json",
    ]
    verify_checkpoint(folder)


def test_step_of(tmp_path):
    assert step_of("/x/global_step_12") == step_of(tmp_path / "global_step_12") == 12
    for name in ("global_step_12.tmp", "global_step_", "global_step_1a", "my_global_step_1", "actor"):
        with pytest.raises(ValueError, match="expected a folder named global_step_N"):
            step_of(tmp_path / name)


# ---- the newest


def test_find_latest(tmp_path):
    assert find_latest_ckpt_path(None) is None
    assert find_latest_ckpt_path(tmp_path) is None
    assert find_latest_ckpt_path(tmp_path / "nowhere") is None
    save(tmp_path, 9)
    assert find_latest_ckpt_path(tmp_path) == str(tmp_path / "global_step_9")
    save(tmp_path, 10)
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_10")


def test_find_latest_takes_what_was_written_last(tmp_path):
    # A run that went back to step 5 and goes on from there.
    save(tmp_path, 10)
    save(tmp_path, 5)
    assert find_latest_ckpt_path(tmp_path) == str(tmp_path / "global_step_5")


def test_an_interrupted_checkpoint_is_ignored(tmp_path):
    write(start_checkpoint(tmp_path, 3), FILES)
    assert find_latest_ckpt_path(tmp_path) is None
    save(tmp_path, 2)
    assert find_latest_ckpt_path(tmp_path) == str(tmp_path / "global_step_2")


def test_the_tracker_may_end_with_a_newline(tmp_path):
    save(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    assert find_latest_ckpt_path(tmp_path) == str(tmp_path / "global_step_4")


def test_the_tracker_leads_nowhere_else(tmp_path):
    elsewhere = tmp_path / "others" / "global_step_7"
    for folder in (elsewhere, tmp_path / "run" / "global_step_5"):
        folder.mkdir(parents=True)
    for step in ("5/../../others/global_step_7", "5/", "٥", "5\n5"):
        Path(get_checkpoint_tracker_filename(tmp_path / "run")).write_text(step)
        with pytest.raises(ValueError, match="is damaged"):
            find_latest_ckpt_path(tmp_path / "run")


def test_the_tracker_names_a_folder_that_is_gone(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    (tmp_path / "global_step_8.tmp").mkdir()
    with pytest.raises(FileNotFoundError, match=r"names step 8.*global_step_8 does not exist.*resume_mode=disable"):
        find_latest_ckpt_path(tmp_path)


# ---- damage


def damage_content(folder):
    (folder / "actor/model/a.safetensors").write_bytes(b"weighty")


def damage_length(folder):
    (folder / "actor/model/a.safetensors").write_bytes(b"weight")


def remove(folder):
    (folder / "actor/model/a.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_content, damage_length, remove])
def test_verify_names_the_damaged_file(tmp_path, damage):
    folder = save(tmp_path, 1)
    verify_checkpoint(folder)
    verify_checkpoint(str(folder))
    damage(folder)
    with pytest.raises(ValueError, match="damaged") as caught:
        verify_checkpoint(folder)
    message = str(caught.value)
    assert "actor/model/a.safetensors" in message
    assert str(folder) in message
    assert "critic/model/b.safetensors" not in message
    assert "resume_from_path" in message


def test_a_checkpoint_under_another_ones_name_is_refused(tmp_path):
    for step in (1, 2):
        folder = start_checkpoint(tmp_path, step)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        commit_checkpoint(folder)
        verify_checkpoint(tmp_path / f"global_step_{step}")
    (tmp_path / "global_step_2").rename(tmp_path / "global_step_3")
    with pytest.raises(ValueError, match=r"global_step_3 is not of step 3: it was written as global_step_2"):
        verify_checkpoint(tmp_path / "global_step_3")


def test_verify_names_all_damaged_files(tmp_path):
    folder = save(tmp_path, 1)
    remove(folder)
    (folder / "empty").write_bytes(b"no longer")
    with pytest.raises(ValueError, match=r"actor/model/a\.safetensors, empty"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("place", [3, (1 << 24) + 5])
def test_verify_reads_large_files_whole(tmp_path, place):
    # The checksum goes block by block (16 MiB): damage counts in the first and beyond it.
    folder = save(tmp_path, 1, {"big": bytes((1 << 24) + 10)})
    verify_checkpoint(folder)
    with (folder / "big").open("r+b") as stream:
        stream.seek(place)
        stream.write(b"x")
    with pytest.raises(ValueError, match="big"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["actor/model/more.safetensors", "critic/optim/shard-2.safetensors"])
def test_verify_names_shards_that_were_not_written(tmp_path, name):
    folder = save(tmp_path, 1)
    write(folder, {"actor/merged/model.safetensors": b"of the user", "notes.safetensors": b"", "actor/model/note": b""})
    verify_checkpoint(folder)
    write(folder, {name: b"of another checkpoint"})
    with pytest.raises(ValueError, match=f"written without.*remove {name}"):
        verify_checkpoint(folder)


def test_the_disk_has_a_checkpoint_before_it_has_its_name(tmp_path, monkeypatch):
    """Files and folders; a file system that knows no such thing is no obstacle, and a failing disk is."""
    synced, names = [], {}
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: names.update({str(to): set(synced)}) or rename(path, to))
    final = save(tmp_path, 1)
    temporary = f"{tmp_path}/global_step_1.tmp"
    expected = {f"{temporary}/{name}" for name in FILES} | {f"{temporary}/checksums.json", temporary}
    assert names[str(final)] >= expected | {f"{temporary}/actor/model", f"{temporary}/critic"}
    assert str(tmp_path) in synced

    def refuse(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    verify_checkpoint(save(tmp_path, 2))
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 3)
    assert find_latest_ckpt_path(tmp_path) == str(tmp_path / "global_step_2")


# ---- pruning


def test_prune_keeps_the_newest_by_number(tmp_path):
    for step in (9, 10, 100, 8):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, "actor", 2, newest=1000)
    with_actor = sorted(step_of(path) for path in tmp_path.glob("global_step_*") if (path / "actor").is_dir())
    assert with_actor == [10, 100]
    assert all((tmp_path / f"global_step_{step}" / "critic").is_dir() for step in (8, 9, 10, 100))


def test_prune_never_removes_what_was_just_written(tmp_path):
    """A run that starts again at step 60 in a folder that holds an earlier run's step 100."""
    for step in (100, 50, 60):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, "actor", 1, newest=60)
    with_actor = sorted(step_of(path) for path in tmp_path.glob("global_step_*") if (path / "actor").is_dir())
    assert with_actor == [60, 100]


def test_prune_removes_a_checkpoint_without_parts(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, "actor", 1, newest=1000)
    prune_checkpoints(tmp_path, "critic", 2, newest=1000)
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest_checkpointed_iteration.txt"]
    assert not (tmp_path / "global_step_2" / "actor").exists()
    assert (tmp_path / "global_step_2" / "critic").is_dir()
    verify_checkpoint(tmp_path / "global_step_3")


def test_prune_keeps_all(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    before = sorted(tmp_path.rglob("*"))
    prune_checkpoints(tmp_path, "actor", None, newest=1000)
    prune_checkpoints(tmp_path, "actor", 3, newest=1000)
    prune_checkpoints(tmp_path, "critic", 10, newest=1000)
    assert sorted(tmp_path.rglob("*")) == before


def test_prune_leaves_other_folders_alone(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    others = ["global_step_0.tmp/actor/x", "global_step_best/actor/x", "tensorboard/actor/x"]
    write(tmp_path, dict.fromkeys(others, b"x"))
    prune_checkpoints(tmp_path, "actor", 1, newest=1000)
    assert all((tmp_path / other).is_file() for other in others)
    assert not (tmp_path / "global_step_1" / "actor").exists()


# ---- what a run with a discriminator keeps beside the models


def test_replayed_answers_that_are_gone_are_missed(tmp_path):
    folder = save(tmp_path, 1, FILES | {"replay.safetensors": b"past"})
    verify_checkpoint(folder)
    (folder / "replay.safetensors").unlink()
    with pytest.raises(ValueError, match=r"damaged: replay\.safetensors"):
        verify_checkpoint(folder)


def test_they_go_with_the_critic(tmp_path):
    folders = [save(tmp_path, step, FILES | {"held_out.safetensors": b"answers"}) for step in (1, 2)]
    prune_checkpoints(tmp_path, "critic", keep=1, newest=2)
    assert not (folders[0] / "held_out.safetensors").exists()
    assert (folders[1] / "held_out.safetensors").exists()
    verify_checkpoint(folders[0])


# ---- the best


def save_as_best(root, step):
    folder = start_checkpoint(root, step)
    write(folder, FILES)
    mark_only_as_best(folder)
    return commit_checkpoint(folder)


def test_best_names_a_checkpoint_and_moves_with_the_folder(tmp_path):
    run = tmp_path / "run"
    for step in (7, 12):
        save(run, step)
        point_best(run, step)
    assert names(run) == ["best", "global_step_12", "global_step_7", "latest_checkpointed_iteration.txt"]
    run.rename(tmp_path / "moved")
    best = tmp_path / "moved" / "best"
    assert (best_step(best.parent), step_of(best)) == (12, 12)
    verify_checkpoint(best)
    assert behind_best(best / "actor" / "model") == tmp_path / "moved" / "global_step_12" / "actor" / "model"
    for other in (tmp_path / "best" / "actor", tmp_path / "moved" / "global_step_7", best.parent):
        assert behind_best(other) == other


def test_best_is_read_from_the_checkpoint_it_names_now(tmp_path, monkeypatch):
    write(tmp_path, {"global_step_3/actor/huggingface/config.json": b"{}", "global_step_3/actor/model/a": b"x"})
    point_best(tmp_path, 3)
    assert find_model(tmp_path / "best" / "actor").shards == tmp_path / "global_step_3" / "actor" / "model"
    monkeypatch.chdir(tmp_path)
    assert str(find_model("best/actor").shards) == "global_step_3/actor/model"
    with pytest.raises(FileNotFoundError, match=r"did you mean .*global_step_3/actor"):
        find_model("best")


@pytest.mark.parametrize("make", ["file", "folder", "elsewhere", "nothing"])
def test_what_is_not_such_a_link_names_no_step(tmp_path, make):
    link = tmp_path / BEST
    {"file": link.touch, "folder": link.mkdir, "elsewhere": lambda: link.symlink_to(".."), "nothing": str}[make]()
    assert best_step(tmp_path) is None
    assert behind_best(link / "actor") == link / "actor"


def test_an_interrupted_link_is_made_again(tmp_path):
    (tmp_path / "best.tmp").symlink_to("global_step_1")
    point_best(tmp_path, 2)
    assert best_step(tmp_path) == 2
    assert names(tmp_path) == ["best"]


def with_part(root, part):
    return sorted(step_of(path) for path in root.glob("global_step_*") if (path / part).is_dir())


def test_prune_spares_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    point_best(tmp_path, 2)
    for part in ("actor", "critic"):
        prune_checkpoints(tmp_path, part, 1, newest=4)
        assert with_part(tmp_path, part) == [2, 4]
    point_best(tmp_path, 4)
    prune_checkpoints(tmp_path, "actor", 1, newest=4)
    assert (with_part(tmp_path, "actor"), with_part(tmp_path, "critic")) == ([4], [2, 4])


def test_prune_does_not_count_what_is_there_only_as_best(tmp_path):
    """Two regular checkpoints are kept, however many bests come between them."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    save_as_best(tmp_path, 3)
    point_best(tmp_path, 3)
    prune_checkpoints(tmp_path, "actor", 2, newest=3)
    assert with_part(tmp_path, "actor") == [1, 2, 3]
    save(tmp_path, 4)
    prune_checkpoints(tmp_path, "actor", 2, newest=4)
    assert with_part(tmp_path, "actor") == [2, 3, 4]


def test_former_bests_are_removed_whole(tmp_path):
    for step in (2, 5, 8):
        save_as_best(tmp_path, step)
    save(tmp_path, 4)
    write(tmp_path, {"global_step_3.tmp/only_as_best.txt": b"", "global_step_3.tmp/actor/half": b""})
    point_best(tmp_path, 5)
    remove_former_bests(tmp_path, newest=5)
    assert names(tmp_path) == [
        "best",
        "global_step_3.tmp",
        "global_step_4",
        "global_step_5",
        "global_step_8",  # an earlier run's
        "latest_checkpointed_iteration.txt",
    ]
    verify_checkpoint(tmp_path / "best")
