"""Where a run goes on after a crash or damage: real folders, damaged and interrupted on purpose."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.trainer.ppo.test_best import VALUES, Trainer, latest, saved
from tests.utils.test_checkpoint_manager import FILES, names, save, write
from verl.utils.checkpoint.checkpoint_manager import (
    publish_checkpoint,
    seal_checkpoint,
    start_checkpoint,
    verify_checkpoint,
)
from verl.utils.checkpoint.recovery import clear_up, newest_whole, refuse_damaged

TRACKER = "latest_checkpointed_iteration.txt"
SHARD = "actor/model/a.safetensors"


@pytest.fixture
def run(tmp_path):
    for step in (3, 4):
        save(tmp_path, step)
    return tmp_path


def flip(folder):
    (folder / SHARD).write_bytes(b"weightz")


DAMAGES = {
    "bit": flip,
    "cut": lambda folder: (folder / SHARD).write_bytes(b"wei"),
    "gone": lambda folder: (folder / SHARD).unlink(),
    "empty state": lambda folder: (folder / "trainer_state.json").write_bytes(b""),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "empty checksums": lambda folder: (folder / "checksums.json").write_bytes(b""),
    "checksums of nothing": lambda folder: (folder / "checksums.json").write_text("{}"),
    "checksums of bytes": lambda folder: (folder / "checksums.json").write_bytes(b"\xff" * 9),
    "stray shard": lambda folder: (folder / "actor/model/z.safetensors").write_bytes(b"of another"),
    "no critic": lambda folder: shutil.rmtree(folder / "critic"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_one_is_set_aside_and_passed_over(run, damage, caplog):
    damage(run / "global_step_4")
    assert newest_whole(run, ("actor", "critic")) == run / "global_step_3"
    assert names(run) == ["global_step_3", "global_step_4.damaged", TRACKER]
    assert (run / TRACKER).read_text() == "3"
    assert f"set aside as {run / 'global_step_4.damaged'}" in caplog.text
    assert "going on from" in caplog.text and "resume_path" not in caplog.text
    assert newest_whole(run, ("actor",)) == run / "global_step_3"


# A checkpoint without its critic may be named: stages that have none can use it.
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "no critic"])
def test_a_damaged_one_that_was_named_is_refused(run, damage):
    DAMAGES[damage](run / "global_step_4")
    with pytest.raises(ValueError, match=r"whole beside it: global_step_3\)"):
        refuse_damaged(run / "global_step_4")
    refuse_damaged(run / "global_step_3")
    assert names(run) == ["global_step_3", "global_step_4", TRACKER]


def test_none_is_whole(run):
    for step in (3, 4):
        flip(run / f"global_step_{step}")
    with pytest.raises(ValueError, match=r"no checkpoint .* is whole: .*global_step_4.*global_step_3.*disable"):
        newest_whole(run, ("actor",))
    with pytest.raises(ValueError, match="none beside it is whole"):
        refuse_damaged(run / "global_step_4")
    assert names(run) == ["global_step_3", "global_step_4", TRACKER], "what may still be mended keeps its name"


def test_several_are_damaged_and_one_was_set_aside_before(run):
    save(run, 5)
    (run / "global_step_5.damaged").mkdir()
    for step in (4, 5):
        flip(run / f"global_step_{step}")
    assert newest_whole(run, ("actor",)) == run / "global_step_3"
    assert names(run) == ["global_step_3", "global_step_4.damaged", "global_step_5.damaged", "global_step_5.damaged-2",
                          TRACKER]  # fmt: skip


def test_an_older_one_without_its_critic_is_passed_over(run, caplog):
    caplog.set_level("INFO")
    save(run, 5)
    shutil.rmtree(run / "global_step_4" / "critic")
    flip(run / "global_step_5")
    assert newest_whole(run, ("actor", "critic")) == run / "global_step_3"
    assert (run / "global_step_4").is_dir() and "has no critic any more" in caplog.text


def test_another_stages_newest_one_is_not_damaged(tmp_path):
    save(tmp_path, 4, {"actor/x": b"x"})
    assert newest_whole(tmp_path, ("actor", "critic")) == tmp_path / "global_step_4"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_only_a_disk_that_fails_is_damage(run, monkeypatch, number):
    """A server that is away for a moment, or a folder that may not be read, says nothing about the checkpoint."""
    newest, opened = str(run / "global_step_4" / SHARD), Path.open

    def fail(path, *args, **kwargs):
        if str(path) == newest:
            raise OSError(number, os.strerror(number))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    if number == errno.EIO:
        assert newest_whole(run, ("actor",)) == run / "global_step_3"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            newest_whole(run, ("actor",))
        assert (run / "global_step_4").is_dir()


# ---- the tracker


def test_without_checkpoints_there_is_none(tmp_path):
    assert newest_whole(tmp_path, ("actor",)) is None
    write(start_checkpoint(tmp_path, 3), FILES)
    assert newest_whole(tmp_path, ("actor",)) is None


def test_a_missing_tracker_is_no_fresh_start(run):
    (run / TRACKER).unlink()
    with pytest.raises(FileNotFoundError, match=r"global_step_3, global_step_4, .*missing.*\(3, 4\).*mode=disable"):
        newest_whole(run, ("actor",))


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"four", b"-1", b"4 3"])
def test_a_tracker_that_names_no_step(run, content):
    (run / TRACKER).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{TRACKER} is damaged.*\(3, 4\) into that file.*resume_mode=disable"):
        newest_whole(run, ("actor",))


def test_a_tracker_that_names_what_is_not_there(run, caplog):
    (run / TRACKER).write_text("8")
    assert newest_whole(run, ("actor",)) == run / "global_step_4"
    assert "names step 8, which cannot be taken: going on from" in caplog.text
    (run / TRACKER).write_text("2")
    with pytest.raises(FileNotFoundError, match=r"names step 2, but .*\(3, 4\)"):
        newest_whole(run, ("actor",))


def test_the_tracker_wins_over_later_folders_and_it_is_said(run, caplog):
    (run / TRACKER).write_text("3")
    assert newest_whole(run, ("actor",)) == run / "global_step_3"
    assert "going on from global_step_3, not from global_step_4" in caplog.text


# ---- crashes


class PowerCut(BaseException):
    """Nothing runs after it, no handler either."""


def interrupt(monkeypatch, renames):
    """The end comes in place of the rename with this number, counted from 0: two of folders, then the tracker."""
    left = [renames]

    def limited(real):
        def rename(*args):
            left[0] -= 1
            if left[0] < 0:
                raise PowerCut
            return real(*args)

        return rename

    monkeypatch.setattr(Path, "rename", limited(Path.rename))
    monkeypatch.setattr(os, "replace", limited(os.replace))


@pytest.mark.parametrize(("renames", "newest", "content"), [(0, 4, b"weights"), (1, 5, b"weights")])
def test_a_crash_while_a_new_step_is_published(run, monkeypatch, renames, newest, content):
    """Before it has its name; before the tracker names it."""
    with monkeypatch.context() as patch:
        interrupt(patch, renames)
        with pytest.raises(PowerCut):
            save(run, 5)
    clear_up(run)
    assert newest_whole(run, ("actor",)) == run / f"global_step_{newest}"
    assert names(run) == [*(f"global_step_{step}" for step in range(3, newest + 1)), TRACKER]
    assert (run / f"global_step_{newest}" / SHARD).read_bytes() == content


def test_a_crash_before_the_first_tracker(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        with pytest.raises(PowerCut):
            save(tmp_path, 1)
    clear_up(tmp_path)
    assert newest_whole(tmp_path, ("actor",)) == tmp_path / "global_step_1"


@pytest.mark.parametrize(("renames", "content"), [(0, b"weights"), (1, b"weights"), (2, b"anew"), (3, b"anew")])
def test_a_crash_while_a_step_is_replaced(run, monkeypatch, renames, content):
    """Before the first rename, between the two, before the tracker, and not at all."""
    with monkeypatch.context() as patch:
        interrupt(patch, renames)
        try:
            save(run, 4, {**FILES, SHARD: b"anew"})
        except PowerCut:
            assert renames < 3
    clear_up(run)
    assert newest_whole(run, ("actor",)) == run / "global_step_4"
    assert (run / "global_step_4" / SHARD).read_bytes() == content
    assert names(run) == ["global_step_3", "global_step_4", TRACKER]


def test_what_was_replaced_comes_back_for_a_damaged_successor(run):
    shutil.copytree(run / "global_step_4", run / "global_step_4.old")
    flip(run / "global_step_4")
    clear_up(run)
    assert names(run) == ["global_step_3", "global_step_4", "global_step_4.damaged", TRACKER]
    verify_checkpoint(run / "global_step_4")


def test_leftovers_go_with_a_line_and_what_is_not_ours_stays(run, tmp_path_factory, caplog):
    caplog.set_level("INFO")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(start_checkpoint(run, 7), FILES)
    write(run, {"global_step_2.pruned/actor/x": b"", "global_step_3/critic.pruned/x": b"", "notes.tmp/x": b""})
    (run / "global_step_9.tmp").symlink_to(elsewhere)
    clear_up(run)
    assert names(run) == ["global_step_3", "global_step_4", "global_step_9.tmp", TRACKER, "notes.tmp"]
    assert elsewhere.is_dir() and not (run / "global_step_3" / "critic.pruned").exists()
    assert f"removing {run / 'global_step_7.tmp'}, which a run that ended left half written" in caplog.text
    assert f"removing {run / 'global_step_2.pruned'}, which a run that ended left half removed" in caplog.text


def test_a_file_or_a_link_in_the_place_of_what_was_replaced_stays(run):
    (run / "global_step_4.old").touch()
    (run / "global_step_3.old").symlink_to(run / "global_step_4")
    clear_up(run)
    assert {"global_step_4.old", "global_step_3.old", "global_step_4"} <= set(names(run))


def test_a_checkpoint_may_be_published_over_a_leftover(run):
    temporary = start_checkpoint(run, 4)
    write(temporary, FILES)
    (run / "global_step_4.old").mkdir()
    seal_checkpoint(temporary)
    publish_checkpoint(temporary)
    assert names(run) == ["global_step_3", "global_step_4", TRACKER]


# ---- the loop


@pytest.mark.parametrize("damage", ["bit", "no checksums", "stray shard"])
def test_the_same_command_recovers_by_itself(tmp_path, damage):
    """As a job that is put back in the queue after its disk lost the newest checkpoint."""
    settings = {"best_metric": None, "test_freq": -1, "save_freq": 2}
    Trainer(tmp_path, VALUES[:7], **settings).fit()
    newest = tmp_path / "global_step_6"
    if damage == "bit":
        (newest / "actor" / "model").write_text("7")
    elif damage == "no checksums":
        (newest / "checksums.json").unlink()
    else:
        (newest / "actor" / "optim").mkdir()
        (newest / "actor" / "optim" / "stray.safetensors").touch()
    again = Trainer(tmp_path, VALUES, **settings)
    again.fit()
    assert sorted(again.logged) == [4, 5, 6, 7, 8, 9] and latest(tmp_path) == 10
    shutil.rmtree(tmp_path / "global_step_6.damaged")
    assert saved(tmp_path) == ("2 4 6 8 10", None)
