"""A disk that is full before a checkpoint is written, or while it is: a small file system in memory."""

from __future__ import annotations

import errno
import subprocess

import pytest
import torch

from tests.faults.small_disk import small_disk
from tests.trainer.ppo.test_best import VALUES, Trainer, latest, saved
from verl.utils.checkpoint.checkpoint_manager import seal_checkpoint, start_checkpoint
from verl.utils.checkpoint.recovery import clear_up
from verl.utils.checkpoint.room import bytes_in, check_room, explain_full_disk
from verl.utils.checkpoint.sharded import write_sharded


@pytest.fixture
def disk(tmp_path):
    """A folder with room for 1 MiB."""
    with small_disk(tmp_path / "disk", "1m") as place:
        yield place


def test_a_lack_of_room_is_seen_before_anything_is_written(disk):
    """The first checkpoint is estimated; the later ones are as large as the last."""
    settings = {"best_metric": None, "test_freq": -1, "save_freq": 1}
    trainer = Trainer(disk / "run", VALUES, **settings)
    trainer.checkpoints.size = 3 << 20
    with pytest.raises(
        OSError, match=r"needs 3\.00 MiB and .*run has room for (1\.00|0\.99) MiB: make room.*untouched"
    ):
        trainer.fit()
    assert sorted(file.name for file in (disk / "run").iterdir()) == ["run.json", "settings.json"]

    trainer = Trainer(disk / "run", VALUES, **settings)
    fill = disk / "fill"
    step = trainer._make_step

    def make_step(prompts, timed):
        if trainer.global_step == 3:
            fill.write_bytes(b"x" * (bytes_in_free(disk) - 4096))
        step(prompts, timed)

    trainer._make_step = make_step
    with pytest.raises(OSError, match=r"needs 0\.0\d MiB and .*has room for 0\.00 MiB"):
        trainer.fit()
    assert saved(disk / "run") == ("1 2 3", None) and latest(disk / "run") == 3
    fill.unlink()
    Trainer(disk / "run", VALUES, **settings).fit()
    assert latest(disk / "run") == 10


def bytes_in_free(disk):
    lines = subprocess.run(["df", "-B1", "--output=avail", disk], check=True, capture_output=True, text=True).stdout
    return int(lines.split()[-1])


def test_a_disk_that_fills_while_shards_are_written_is_named(disk):
    folder = start_checkpoint(disk, 1)
    words = r"the disk is full: make room.*global_step_1\.tmp"
    with pytest.raises(OSError, match=words) as refused, explain_full_disk(folder):
        write_sharded({"w": torch.zeros(1 << 20)}, folder / "actor" / "model")
    assert refused.value.errno == errno.ENOSPC
    clear_up(disk)
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_while_small_files_are_written_is_named(disk):
    folder = start_checkpoint(disk, 1)
    (disk / "fill").write_bytes(b"x" * (bytes_in_free(disk)))
    with pytest.raises(OSError, match=r"the disk is full.*global_step_1\.tmp"), explain_full_disk(folder):
        (folder / "trainer_state.json").write_text("{}")


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(KeyError), explain_full_disk(tmp_path):
        raise KeyError("x")


def test_room_counts_whole_blocks(disk):
    for number in range(10):
        (disk / f"{number}").write_bytes(b"x")
    assert bytes_in(disk) == 10 * 4096
    check_room(disk, bytes_in_free(disk))
    with pytest.raises(OSError, match="needs"):
        check_room(disk, bytes_in_free(disk) + 1)


def test_what_was_promised_and_not_written_is_no_checkpoint(tmp_path):
    folder = start_checkpoint(tmp_path, 1)
    (folder / "actor").mkdir()
    (folder / "actor" / "x").touch()
    with pytest.raises(ValueError, match="has no critic"):
        seal_checkpoint(folder, ("actor", "critic"))
    (folder / "critic").mkdir()
    with pytest.raises(ValueError, match="has no critic"):
        seal_checkpoint(folder, ("actor", "critic"))
