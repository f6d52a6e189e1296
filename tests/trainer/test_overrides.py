"""Overrides as people type them, through `KEY=VALUE` and through the stage scripts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from verl.trainer.config import Config, ConfigError, compose_config
from verl.trainer.config.overrides import as_hydra_reads_it, quoted

ROOT = Path(__file__).parents[2]
REQUIRED = {"trainer.experiment_name": "x", "data.train_files": "/d", "actor_rollout_ref.model.path": "/m"}
AS_TYPED = [
    "中文",
    "/数据/训练 集/a.parquet",
    "a b",
    "a=b",
    "~/x",
    "~x",
    "a#b",
    "x # y",
    "a(b",
    "a(b)",
    "int(3)",
    "choice(a,b)",
    "it's",
    "a,b",
    "2024",
    "001",
    "1e5",
    "1_000",
    "true",
    "C:\\d",
    "C:\\d\\",
    "a\\'b",
    "'",
    "\"x",
    "''a",
    "a$b",
    "a%b;c&d!e|f",
    "<x>`y`",
    "a@b",
    "[a",
    "a]",
    "(a)",
    "é😀",
    "实验 一, 二 (#3) it's=~\\",
]  # fmt: skip


def composed(*overrides: str, **given: str) -> Config:
    settings = REQUIRED | given
    return compose_config([*(f"{key}={value}" for key, value in settings.items()), *overrides])


@pytest.mark.parametrize("text", AS_TYPED)
@pytest.mark.parametrize("key", REQUIRED)
def test_text_arrives(key, text):
    if key == "trainer.experiment_name":
        text = text.lstrip("/")  # a run's name is no path of its own
    config = composed(**{key: text})
    arrived = {
        "trainer.experiment_name": config.trainer.experiment_name,
        "data.train_files": config.data.train_files,
        "actor_rollout_ref.model.path": config.actor_rollout_ref.model.path,
    }
    assert arrived == REQUIRED | {key: text}


@pytest.mark.parametrize(
    ("typed", "arrives"),
    [
        ("[/数据/a.parquet,/数据/b.parquet]", ["/数据/a.parquet", "/数据/b.parquet"]),
        ("['数据 #1', b]", ["数据 #1", "b"]),
        ("[/d/a#1.parquet, /d/(b)=2.parquet]", ["/d/a#1.parquet", "/d/(b)=2.parquet"]),
        ("'/数据/a'", "/数据/a"),
        ('"it\'s"', "it's"),
        ("/d/[a].parquet", "/d/[a].parquet"),
    ],
)
def test_lists_and_quoted_text_arrive(typed, arrives):
    assert composed(**{"data.train_files": typed}).data.train_files == arrives


def test_dictionaries_arrive_with_their_types():
    typed = "{name: 张三, n: 3, one: 1, f: 1.5, yes: true, nothing: null, l: [1, 二]}"
    arrived = composed(f"data.apply_chat_template_kwargs={typed}").data.apply_chat_template_kwargs
    assert arrived == {"name": "张三", "n": 3, "one": 1, "f": 1.5, "yes": True, "nothing": None, "l": [1, "二"]}
    assert [type(value) for value in arrived.values()][1:5] == [int, int, float, bool]


def test_numbers_null_and_interpolations_keep_their_meaning(monkeypatch):
    monkeypatch.setenv("PLACE", "/here")
    config = composed(
        "data.val_files=null", "data.train_batch_size=3", "trainer.default_local_dir=${oc.env:PLACE}/数据"
    )
    assert (config.data.val_files, config.data.train_batch_size) == (None, 3)
    assert config.trainer.default_local_dir == "/here/数据"
    assert composed("trainer.default_local_dir=${oc.env:PLACE}/x").trainer.default_local_dir == "/here/x"


@pytest.mark.parametrize("override", ["data.名字=3", "data.apply_chat_template_kwargs={名字: 张三}", "a b=3"])
def test_a_key_that_cannot_be_is_unknown(override):
    with pytest.raises(ConfigError, match="unknown key"):
        composed(override)


def test_what_needs_no_quotation_marks_gets_none():
    assert [as_hydra_reads_it(text) for text in ("3", "a b", "[1,2]", "'x'", "null")] == [
        "3", "a b", "[1,2]", "'x'", "null",
    ]  # fmt: skip
    # A mark gets a backslash; backslashes before a mark, or at the end, are doubled; others are not.
    assert quoted("it's") == r"'it\'s'" and quoted("a\\b") == r"'a\b'" and quoted("a\\") == r"'a\\'"


# ---- the stage scripts


@pytest.fixture
def recording_python(tmp_path) -> Path:
    """A PYTHON for the scripts that writes the settings it would train with, and is the real one otherwise."""
    code = tmp_path / "dump.py"
    code.write_text(
        "import json, sys\nfrom verl.trainer.config import compose_config\nc = compose_config(sys.argv[1:])\n"
        "print(json.dumps([c.data.train_files, c.actor_rollout_ref.model.path, c.trainer.experiment_name,"
        " c.trainer.default_local_dir]))\n"
    )
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/bash\n[[ $2 == verl.trainer.main_ppo ]] && exec "{sys.executable}" "{code}" "${{@:3}}"\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def run_script(script: str, python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"PYTHON": str(python), "N_GPUS_PER_NODE": "1", "TENSORBOARD": "off", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "train" / script), *arguments],
        env=os.environ | settings | environment, capture_output=True, text=True, cwd=python.parent, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["it's 数据 (#1)=~", "1e5", "a b"])
def test_flags_and_settings_of_a_script_arrive(recording_python, text):
    done = run_script(
        "gpt5-8b-SeqKD-gspo.sh", recording_python, "--model", f"/m/{text}", "--exp_name", text,
        f"trainer.default_local_dir=/out/{text}", DATA_DIR=f"/d/{text}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"/d/{text}/train.parquet", f"/m/{text}", text, f"/out/{text}"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("setting", ["trainer.default_local_dir", "++trainer.default_tensorboard_dir"])
def test_tensorboard_shows_the_folder_that_the_settings_name(recording_python, tmp_path, setting):
    folder = tmp_path / "it's 这里"
    done = run_script(
        "gpt5-8b-gad-gspo.sh", recording_python, "--model", "/m", "--reward_model", "/r", "--exp_name", "x",
        f"{setting}={folder}", TENSORBOARD="on", TENSORBOARD_PORT=str(free_port()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"(runs under {folder})" in done.stdout
    assert (folder / "tensorboard.log").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("value", ["9" * 5000, f"[{'9' * 5000}]", f"{{a:{'9' * 5000}}}"])
def test_a_number_longer_than_python_reads_is_text(value):
    assert as_hydra_reads_it(value) == f"'{value}'"
    with pytest.raises(ConfigError, match=r"data\.train_batch_size"):
        compose_config([f"data.train_batch_size={value}"])
