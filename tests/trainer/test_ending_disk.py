"""What checkpoints take of the disk: the arithmetic by hand, and starts on real, small disks."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.e2e.running import train
from tests.faults.small_disk import small_disk
from tests.tiny import causal_lm, scorer, write_data, write_model
from tests.trainer.ppo.test_best import config
from verl.trainer.in_process import InProcessRunner, InProcessTrainer
from verl.trainer.ppo.disk import checkpoints_to_come
from verl.utils.checkpoint.checkpoint_manager import checkpoints_in
from verl.utils.checkpoint.room import Part, most_on_disk


@pytest.mark.parametrize(
    ("parts", "there", "to_come", "best", "most"),
    [
        # Two kept and the third being written, of 10 bytes; a fourth for the best.
        ([Part(10, 2)], 0, 20, False, 30),
        ([Part(10, 2)], 0, 20, True, 40),
        # No more than there will be.
        ([Part(10, 2)], 0, 1, False, 10),
        ([Part(10, 2)], 1, 1, False, 20),
        ([Part(10, None)], 3, 4, False, 70),
        # 3 actors, 2 critics.
        ([Part(10, 2), Part(7, 1)], 0, 9, False, 44),
    ],
)
def test_the_most_at_once(parts, there, to_come, best, most):
    assert most_on_disk(parts, there, to_come, best) == most


@pytest.mark.parametrize(
    ("save_freq", "done", "steps", "count"),
    # 50, 100, 120; 100, 120 after 50; 120 after 119; the end alone; none.
    [(50, 0, 120, 3), (50, 50, 120, 2), (50, 119, 120, 1), (-1, 0, 120, 1), (40, 0, 120, 3), (50, 120, 120, 0)],
)
def test_how_many_are_to_come(tmp_path, save_freq, done, steps, count):
    assert checkpoints_to_come(config(tmp_path, save_freq=save_freq), done, steps) == count


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "base")
    write_data(tmp_path / "train.jsonl", rows=8)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


QUIET = ("data.val_files=null", "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=1")


def test_the_estimate_is_what_is_written_and_what_will_go_is_named(folder, caplog):
    caplog.set_level("INFO")
    sizes = []

    class Seen(InProcessTrainer):
        def fit(self):
            sizes.append(self.checkpoints.size)
            super().fit()

    class Runner(InProcessRunner):
        trainer_class = Seen

    def go(steps, *overrides):
        return train(
            folder, "run", "stage=warmup", "trainer.critic_warmup=1", f"critic.model.path={folder}/base",
            f"trainer.total_training_steps={steps}", "critic.held_out_prompts=0", *QUIET, *overrides,
            run_with=lambda settings: Runner().run(settings),
        )  # fmt: skip

    run = go(4)
    models = [causal_lm(), scorer()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    estimate = 12 * sum(parameter.numel() for parameter in parameters)
    # AdamW counts its steps, four bytes for each tensor.
    assert estimate <= sizes[0] <= estimate + 4 * len(parameters)
    # All four are kept here.
    each, together = (f"{size / 2**20:.2f} MiB" for size in (estimate, 4 * estimate))
    assert f"checkpoints take {each} each (12 bytes a parameter), up to {together} while one is written" in caplog.text
    assert [path.name for path in checkpoints_in(run)] == [f"global_step_{step}" for step in range(1, 5)]

    caplog.clear()
    go(5, "trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=3")
    goes = f"older checkpoints in {run} go after the next step: global_step_1, global_step_2"
    assert f"{goes} (kept are actor: the last 2, critic: the last 3" in caplog.text
    assert "pruned global_step_2/actor, global_step_1: kept are actor: the last 2, critic: the last 3" in caplog.text
    assert [path.name for path in checkpoints_in(run)] == [f"global_step_{step}" for step in range(3, 6)]
    assert not (run / "global_step_3" / "actor").exists() and (run / "global_step_3" / "critic").is_dir()


def test_a_disk_without_room_for_one_is_refused_before_anything_is_built(folder, caplog):
    """The student takes 12 bytes for each of 27,000 parameters, 0.3 MiB."""
    caplog.set_level("INFO")
    with small_disk(folder / "runs", "200k") as disk:
        with pytest.raises(
            OSError, match=r"a checkpoint needs 0\.\d\d MiB and .*small has room for 0\.\d\d MiB: make room"
        ):
            train(folder, "small", "stage=seqkd", *QUIET, run_with=lambda settings: InProcessRunner().run(settings))
        assert "building models" not in caplog.text and not list(disk.glob("*/global_step_*"))
    caplog.clear()
    (folder / "runs").rmdir()
    with small_disk(folder / "runs", "700k"):
        with pytest.raises(OSError, match="needs"):
            train(
                folder, "small", "stage=seqkd", *QUIET, "trainer.total_training_steps=4",
                run_with=lambda settings: InProcessRunner().run(settings),
            )  # fmt: skip
        assert "there is no room for all of them" in caplog.text
