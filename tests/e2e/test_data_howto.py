"""docs/from_api_key.md: its commands, in their order, on the quick start's world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.world import World
from tests.data_tools.teaching import KEY, files_with_the_key, rows_of, teaching
from tests.e2e.running import read_metrics

ROOT = Path(__file__).parents[2]
PROMPTS = 240
STEPS = 6
HELD_OUT = 24  # In the place of the page's 300.
# What a tiny student on a CPU wants besides.
SETTINGS = (
    "trainer.device=cpu actor_rollout_ref.actor.optim.lr=1e-3 trainer.logger=[file] "
    f"trainer.total_training_steps={STEPS}"
)

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


def blocks() -> list[str]:
    """The code of the page, without its first part, which sets variables."""
    page = (ROOT / "docs" / "from_api_key.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    assert found[0].lstrip().startswith("export OPENAI_API_KEY=")
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found[1:]]


@pytest.fixture
def folder(tmp_path):
    """A checkout's scripts, a base model and prompts."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    build = [sys.executable, "-m", "examples.quickstart.tiny_model", "--out", str(tmp_path), "--pretrain_steps", "40"]
    subprocess.run(build, cwd=ROOT, check=True)
    prompts = World(0).prompts("train")[::4][:PROMPTS]
    (tmp_path / "prompts.txt").write_text("".join(prompt + "\n" for prompt in prompts), encoding="utf-8")
    return tmp_path


def fitted(printed: str) -> str:
    """The settings of SeqKD's line of `verl data lengths`, as the page says to give them to the pipeline."""
    (line,) = re.findall(r"^  bash .*SeqKD.* --nnodes 1 (.*)$", printed, re.MULTILINE)
    return " ".join(
        setting if re.match("data.max_|actor_rollout_ref.rollout.max_", setting) else f"seqkd.{setting}"
        for setting in line.split()
    )


def as_a_reader(code: str, printed: list[str]) -> str:
    """A block of the page with sizes for few rows, and the settings that were printed in the place of its example's."""
    code = code.replace(" 300", f" {HELD_OUT}")
    if "verl distill" in code:
        code = re.sub(r"data\.max_prompt_length=240[^#]*", fitted(printed[4]), code)
        code = code.replace("--exp_name first", f"--exp_name first {SETTINGS}")
    return code.replace("--max_response_length 240", "--max_response_length 32")


def test_from_an_api_key_to_a_trained_student(folder):
    codes = blocks()
    assert len(codes) == 8
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "TEACHER": "teacher", "BASE": str(folder / "base"),
        "N_GPUS_PER_NODE": "1",
    }  # fmt: skip
    said = []
    with teaching(folder, world=True, at_random=[0.05, 2, 500, [429, "0.1"], "length"]) as teacher:
        for number, code in enumerate(codes):
            code = as_a_reader(code, said)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment | {"ENDPOINT": teacher.url},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            said.append(done.stdout)
            assert (len(teacher.texts()) > 0) == (number > 0)
        assert len(teacher.texts()) == PROMPTS
    assert f"estimate: {PROMPTS} answers" in said[0] and f"{PROMPTS} of {PROMPTS} wanted" in said[1]
    sets = {name: rows_of(folder / "data" / f"{name}.parquet") for name in ("train", "test", "judge")}
    rows = rows_of(folder / "data" / "teacher.parquet")
    assert (
        sum(map(len, sets.values())) == len(rows) > 0.9 * PROMPTS
        and len(sets["judge"]) == len(sets["test"]) == HELD_OUT
    )
    world = World(0)
    assert all(world.grade(row["content"][0]["content"], row["teacher_response"]).exact for row in rows)
    assert "nothing of --fail_on was found" in said[2]
    assert "no prompt or near-duplicate is in two of them" in said[3] and "cannot be told apart" in said[3]
    assert "data.max_prompt_length=32" in said[4] and "gpt5-8b-gad-gspo.sh" in said[4]
    settings = json.loads((folder / "checkpoints" / "gad" / "first" / "seqkd" / "settings.json").read_text())
    assert settings["data"]["max_prompt_length"] == 32 and settings["data"]["train_batch_size"] == 16
    metrics = read_metrics(folder / "checkpoints" / "gad" / "first" / "seqkd")
    losses = [metrics[step]["actor/sft_loss"] for step in sorted(metrics) if "actor/sft_loss" in metrics[step]]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    student = folder / "checkpoints" / "gad" / "first" / "students" / "seqkd"
    AutoModelForCausalLM.from_pretrained(student)
    AutoTokenizer.from_pretrained(student)
    assert "closest to the teacher: " in said[5] and f"student of seqkd:   {student}" in said[5]
    judged = json.loads((folder / "data" / "judged" / "judge.json").read_text())
    assert list(judged["students"]) == ["base", "seqkd"] and "told from teacher by fresh discriminators" in said[6]
    assert said[7].strip()
    assert files_with_the_key(folder) == []
