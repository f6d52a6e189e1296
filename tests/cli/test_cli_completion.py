"""`verl completion`: what bash completes with the script that shtab makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl.cli import completion

ROOT = Path(__file__).parents[2]
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_verl; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "verl.bash"
    done = subprocess.run(
        [sys.executable, "-m", "verl.cli", "completion", "bash"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ju"], {"judge"}),
        (["data", "c"], {"collect", "convert", "check", "compare"}),
        (["judge", "--stu"], {"--student"}),
        (["data", "check", "--fail"], {"--fail_on"}),
        (["merge", "--tar"], {"--target_dir"}),
        (["merge", "--test"], {"--test_hf_dir"}),
        (["monitor", "--lang", ""], {"en", "zh"}),
        (["train", "--cfg", ""], {"job", "hydra", "all"}),
        (["--v"], {"--version"}),
        (["score", "--critic", "exam"], {"examples"}),
        (["launch", "--wo"], {"--worker"}),
        # A kind of answers, which is no path.
        (["data", "collect", "--include", "ver"], set()),
    ],
)
def test_bash_completes_commands_flags_values_and_folders(script, words, expected):
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", script, "verl", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_the_other_shells_get_a_script_too(capsys, monkeypatch):
    for shell, beginning in (("zsh", "#compdef verl"), ("tcsh", "# AUTOMATICALLY GENERATED")):
        monkeypatch.setattr(sys, "argv", ["verl completion", shell])
        completion.main()
        assert capsys.readouterr().out.startswith(beginning)
