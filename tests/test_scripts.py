"""Commands that run from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_the_merger_runs_from_a_checkout_that_is_not_installed(tmp_path):
    """-S and a path: the installed packages are there, but what an editable install adds to the path is not."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": sysconfig.get_path("purelib")}
    script = REPOSITORY / "scripts" / "legacy_model_merger.py"
    missing = subprocess.run(
        [sys.executable, "-S", "-c", "import verl"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "No module named 'verl'" in missing.stderr, "installed, which this test is not about"
    helped = subprocess.run(
        [sys.executable, "-S", str(script), "merge", "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert helped.returncode == 0 and "--local_dir" in helped.stdout, helped.stderr


@pytest.mark.parametrize(("version", "fits"), [((3, 9), False), ((3, 10), True), ((3, 12), True), ((3, 13), False)])
def test_make_says_which_python_it_needs(version, fits, tmp_path):
    """A Python that takes itself for another one, and makes no environment."""
    python = tmp_path / "python"
    lines = ("import sys", f"sys.version_info = {(*version, 0)}", 'exec(sys.argv[2] if sys.argv[1] == "-c" else "")')
    python.write_text("\n".join((f"#!{sys.executable}", *lines)) + "\n")
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f"VENV={tmp_path}/venv", f"BIN={tmp_path}/none", "install"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    said = f"error: {python} is Python {version[0]}.{version[1]}, and Python 3.10, 3.11 or 3.12 is needed"
    assert done.returncode and (said not in done.stderr) == fits, done.stderr
