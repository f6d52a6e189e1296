"""Commands that run from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

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
