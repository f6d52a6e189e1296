import subprocess
import sys

import pytest

from verl.utils.run_lock import only_run_in

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
