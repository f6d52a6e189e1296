"""The wheel: what is in it, and that it works away from the checkout; the files of tested versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Not installed where the tests run, each with demands of its own: tested with stand-ins for their servers alone.
APART = {"mlflow", "swanlab", "trackio"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel, of a copy of the sources: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("verl", "scripts", "tests", "examples"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, sources], check=True)
    return next(folder.glob("verl-*.whl"))


@pytest.fixture(scope="module")
def extracted(wheel) -> Path:
    """The wheel's files, away from the checkout."""
    folder = wheel.parent / "extracted"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def away(extracted, tmp_path_factory):
    """Runs a command in another folder, with the extracted wheel for a package."""

    def run(*command: str):
        environment = {**os.environ, "PYTHONPATH": str(extracted)}
        folder = tmp_path_factory.mktemp("away")
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_it_holds_the_package_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in held}
    assert {re.sub(r"-[\d.]+\.", "-N.", top) for top in tops} == {"verl", "verl-N.dist-info"}
    # Links are followed: the stage scripts lie elsewhere.
    there = {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "verl", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert there == {name for name in held if name.startswith("verl/")}
    assert {"verl/scripts/legacy_model_merger.py", "verl/scripts/train/common.sh", "verl/monitor/rules.yaml"} <= there


def test_its_subcommands_answer_away_from_the_checkout(away, extracted):
    code = """
import json, sys
import verl
from verl.cli.commands import VERL, Group
from verl.cli.main import main
said = {}
def ask(words):
    sys.argv = ["verl", *words, "--help"]
    try: code = main()
    except SystemExit as end: code = end.code
    said[" ".join(words)] = code or 0
def walk(group, words=()):
    ask(words)
    for name, command in group.commands.items():
        if isinstance(command, Group): walk(command, (*words, name))
        elif command.is_there(): ask((*words, name))
walk(VERL)
print("\\n" + json.dumps([verl.__file__, said]))
"""
    done = away(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    home, said = json.loads(done.stdout.splitlines()[-1])
    assert Path(home) == extracted / "verl/__init__.py"
    assert set(said.values()) == {0} and {"", "train", "data", "data check", "chat", "judge"} <= set(said)
    # The table of rules is read from the package's data.
    listed = away(sys.executable, "-m", "verl.cli", "monitor", "--list")
    assert listed.returncode == 0 and "critic/d_acc" in listed.stdout


def test_it_composes_settings_and_its_scripts_run_away_from_the_checkout(away, extracted):
    settings = ["stage=gad_short", "data.train_files=x.parquet", "trainer.experiment_name=试验"]
    settings += ["actor_rollout_ref.model.path=m", "critic.model.path=c"]
    composed = away(sys.executable, "-m", "verl.cli", "train", *settings, "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    assert "experiment_name: 试验" in composed.stdout and "train_batch_size: 128" in composed.stdout
    script = away("bash", str(extracted / "verl/scripts/train/gpt5-8b-gad-gspo.sh"), "--help")
    assert script.returncode == 0 and "--reward_model PATH" in script.stdout
    merger = away(sys.executable, str(extracted / "verl/scripts/legacy_model_merger.py"), "merge", "--help")
    assert merger.returncode == 0 and "--local_dir" in merger.stdout, merger.stderr


@pytest.mark.parametrize("script", ["scripts/legacy_model_merger.py", "verl/scripts/legacy_model_merger.py"])
def test_the_mergers_script_is_the_checkouts_from_anywhere(script, tmp_path):
    """As users call it, and by a path: without an install, the package is the one that the script lies in."""
    code = (
        f"import runpy, sys; sys.argv = ['x', 'merge', '--help']; sys.path = [p for p in sys.path if 'verl' not in p]\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\nimport verl; print(verl.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "--target_dir" in done.stdout and done.stdout.splitlines()[-1] == str(ROOT / "verl/__init__.py")


def test_the_stage_scripts_in_the_package_are_those_of_the_checkout():
    packaged, own = ROOT / "verl/scripts/train", ROOT / "scripts/train"
    assert packaged.is_symlink() and packaged.resolve() == own and not own.is_symlink()


# ---- versions


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def required(wheel: Path) -> list[tuple[str | None, Requirement]]:
    """What the wheel asks for, with the extra that it is asked for by."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_string(file.read(name).decode()).get_all("Requires-Dist")
    found = []
    for line in lines:
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        found.append((extra and extra[1], Requirement(line)))
    return found


def test_the_extras_are_there(wheel):
    extras = {extra for extra, _ in required(wheel)}
    assert {None, "gpu", "trackers", "data", "dev", "test", "wandb", "mlflow", "swanlab", "trackio"} <= extras
    of = {extra: {each.name for found, each in required(wheel) if found == extra} for extra in extras}
    assert of["trackers"] == of["wandb"] | of["mlflow"] | of["swanlab"] | of["trackio"]
    assert of["test"] <= of["dev"]
    assert of[None] == {Requirement(line).name for line in (ROOT / "requirements.txt").read_text().split()}


@pytest.mark.parametrize(("file", "gpu"), [("constraints.txt", False), ("constraints-gpu.txt", True)])
def test_tested_versions_are_of_everything_that_is_asked_for_and_fit(wheel, file, gpu):
    versions, asked = pinned(file), set()
    for extra, requirement in required(wheel):
        name = canonicalize_name(requirement.name)
        if (extra == "gpu") == gpu or extra is None:
            wanted = extra is None or (extra == "gpu" if gpu else name not in APART)
            if wanted:
                asked.add(name)
                assert name in versions, f"{name} of {extra or 'requirements.txt'} has no line in {file}"
                assert requirement.specifier.contains(versions[name]), (requirement, versions[name])
    assert asked == set(versions), f"{file} has lines that nothing asks for"
