import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.utils.run_lock import check_writable, only_run_in

HOLD = """
import sys, time
from pathlib import Path
from verl.utils.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    """A killed one leaves nothing behind that would keep the next one out."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=r"another run is at work in .*run.*experiment_name"),
            only_run_in(folder),
        ):
            pass
        with only_run_in(tmp_path / "another"):
            pass
        other.kill()
        other.wait()
        for _ in range(2):
            with only_run_in(folder):
                pass


def test_a_failure_inside_is_not_the_locks(tmp_path, caplog):
    with pytest.raises(OSError, match="mine"), only_run_in(tmp_path):
        raise OSError("mine")
    assert caplog.text == ""
    with only_run_in(tmp_path):
        pass


@pytest.fixture
def nobody():
    """This process without root's rights, for which no folder is closed."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("folder", ["/proc/none/run", "/usr"])
def test_a_folder_that_cannot_be_written_is_named_at_once(nobody, folder):
    with (
        pytest.raises(OSError, match=rf"^trainer.default_local_dir: {folder} cannot be written \(.*: choose another"),
        only_run_in(Path(folder)),
    ):
        pass
    with pytest.raises(OSError, match=rf"^trainer\.rollout_data_dir: {folder} cannot"):
        check_writable(Path(folder), "trainer.rollout_data_dir")
