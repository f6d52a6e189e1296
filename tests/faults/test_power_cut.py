"""The power goes during and after saves: an image of the disk, taken without asking the system to write anything back,
is mounted as the machine would after it, and the run goes on.

Needs root and loop devices.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.running import read_metrics
from tests.tiny import write_data, write_model
from verl.utils.checkpoint.checkpoint_manager import step_of, tracked_step
from verl.utils.checkpoint.recovery import clear_up, newest_whole

ROOT = Path(__file__).parents[2]
MIB = 64
STEPS = 4
RUN = """
import sys, time
from pathlib import Path
from tests.e2e.running import train
from verl.trainer.in_process import run_in_process
disk, steps = Path(sys.argv[1]), int(sys.argv[2])
train(Path(sys.argv[3]), "x", "stage=seqkd", "trainer.val_before_train=False", "trainer.test_freq=-1",
      "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1", f"trainer.total_training_steps={steps}",
      f"trainer.default_local_dir={disk}/run", run_with=run_in_process)
print("done", flush=True)
# What unmounting or an end would write back has to stay in memory.
time.sleep(int(sys.argv[4]))
"""

pytestmark = pytest.mark.e2e


def start(disk: Path, models: Path, steps: int, linger: int) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(disk), str(steps), str(models), str(linger)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@contextmanager
def mounted(image: Path, place: Path):
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def make_image(file: Path) -> Path:
    file.write_bytes(b"")
    os.truncate(file, MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", file], check=True, capture_output=True)
    return file


def as_of_now(image: Path, copy: Path) -> Path:
    """The image at one moment, which a copy made while blocks are written is not: read until two readings agree."""
    content = None
    while content != (content := image.read_bytes()):
        pass
    copy.write_bytes(content)
    return copy


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of the disk by when the power went: seconds after the last save, or the newest step while saving."""
    folder = tmp_path_factory.mktemp("power")
    try:
        image = make_image(folder / "image")
        with mounted(image, folder / "probe"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, mkfs.ext4 and loop devices: {error}")
    write_model(folder / "base")
    write_data(folder / "train.jsonl", rows=18)
    write_data(folder / "val.jsonl", rows=5)
    copies, during = {}, []
    with mounted(image, folder / "disk") as disk:
        process = start(disk, folder, STEPS, linger=60)
        try:
            while process.poll() is None and not (disk / "run" / f"global_step_{STEPS}").is_dir():
                promised = tracked_step(disk / "run") if (disk / "run").is_dir() else None
                if promised is not None:
                    process.send_signal(signal.SIGSTOP)
                    during.append((promised, as_of_now(image, folder / f"during{len(during)}")))
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.1)
            assert process.stdout.readline() == "done\n"
            saved = time.monotonic()
            for seconds in (1, 3, 10):
                time.sleep(max(0.0, saved + seconds - time.monotonic()))
                copies[seconds] = as_of_now(image, folder / f"after{seconds}")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return folder, copies, during


@pytest.mark.parametrize("seconds", [1, 3, 10])
def test_the_run_goes_on_from_the_last_save(images, tmp_path, seconds):
    folder, copies, _ = images
    with mounted(Path(copies[seconds]), tmp_path / "disk") as disk:
        process = start(disk, folder, STEPS + 1, linger=0)
        assert process.wait() == 0
        assert tracked_step(disk / "run") == STEPS + 1
        assert not list((disk / "run").glob("*.damaged*"))
        assert max(read_metrics(disk / "run")) == STEPS


def test_what_the_tracker_had_named_is_there(images, tmp_path):
    """Whenever it goes in the midst of saving, nothing is lost that a reader could have seen named."""
    _, _, during = images
    assert during
    for number, (promised, image) in enumerate(during):
        with mounted(Path(image), tmp_path / f"disk{number}") as disk:
            clear_up(disk / "run")
            assert step_of(newest_whole(disk / "run", ("actor",))) >= promised
            assert not list((disk / "run").glob("*.damaged*"))
