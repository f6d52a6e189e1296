"""The three stage scripts, one after the other, on real teacher data that lies beside the project, where it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from examples.quickstart.tiny_model import build_model, build_tokenizer, pretrain
from tests.e2e.metric_names import (
    COMMON_METRICS,
    DISCRIMINATOR_METRICS,
    POLICY_METRICS,
    SEQKD_METRICS,
    VALIDATION_METRICS,
)
from tests.e2e.running import read_metrics

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
STEPS = 3

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.distributed,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs the teacher data of ../shared/data, which is not here"),
]


def make_model(language: str, folder: Path) -> None:
    """A tokenizer of the data's own words and a tiny model that has seen the beginnings of some answers."""
    frame = pd.read_parquet(DATA / f"chat_{language}_train.parquet")
    rows = [
        {"content": [{"role": m["role"], "content": m["content"][:60]} for m in content], "teacher_response": text[:60]}
        for content, text in zip(frame["content"], frame["teacher_response"], strict=True)
    ]
    texts = [text for row in rows for text in (row["content"][-1]["content"], row["teacher_response"])]
    tokenizer = build_tokenizer(texts, vocab_size=1500)
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=64, num_layers=2, intermediate_size=128)
    pretrain(model, tokenizer, rows, steps=200, batch_size=32, lr=4e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_script(script: str, language: str, folder: Path, name: str, *arguments: str) -> Path:
    """Run a stage script for three steps on two ranks; returns the run's folder."""
    command = [
        *("bash", str(REPOSITORY / "scripts" / "train" / script), "--exp_name", name, "--nnodes", "1", *arguments),
        f"data.train_files={DATA}/chat_{language}_train.parquet",
        f"data.val_files={DATA}/chat_{language}_test.parquet",
        *("data.max_prompt_length=128", "data.max_response_length=96", "data.truncation=left"),
        *("data.train_batch_size=8", "data.val_max_samples=24", "actor_rollout_ref.rollout.n=4"),
        f"trainer.total_training_steps={STEPS}",
    ]
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "N_GPUS_PER_NODE": "2",
        "TENSORBOARD_PORT": "16006",
    }
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    if "gad" in script:
        assert "TensorBoard: http://127.0.0.1:16006" in run.stdout
    return folder / "checkpoints" / "gad" / name


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_three_scripts_one_after_the_other(language, tmp_path):
    make_model(language, tmp_path / "base")
    seqkd = run_script("gpt5-8b-SeqKD-gspo.sh", language, tmp_path, "seqkd", "--model", str(tmp_path / "base"))
    student = seqkd / f"global_step_{STEPS}" / "actor"
    pair = ("--model", str(student), "--reward_model", str(tmp_path / "base"))
    # The preset freezes the actor for ten steps; in three, one frozen step shows both.
    warmup = run_script("gpt5-8b-warmup-gspo.sh", language, tmp_path, "warmup", *pair, "trainer.critic_warmup=1")
    source = warmup / f"global_step_{STEPS}"
    pair = ("--model", str(source / "actor"), "--reward_model", str(source / "critic"))
    gad = run_script("gpt5-8b-gad-gspo.sh", language, tmp_path, "gad", *pair)

    first = read_metrics(seqkd)[0]
    assert first.keys() >= SEQKD_METRICS | VALIDATION_METRICS | COMMON_METRICS
    last = {**read_metrics(warmup)[STEPS - 1], **read_metrics(warmup)[STEPS]}
    assert last.keys() >= DISCRIMINATOR_METRICS | POLICY_METRICS | VALIDATION_METRICS | COMMON_METRICS
    assert "actor/pg_loss" not in read_metrics(warmup)[0]
    every = DISCRIMINATOR_METRICS | POLICY_METRICS | COMMON_METRICS
    assert all(read_metrics(gad)[step].keys() >= every for step in range(STEPS))
    for run in (seqkd, warmup, gad):
        metrics = read_metrics(run)
        assert metrics[0]["val/rouge-L/mean"] > 0
        assert metrics[STEPS]["val/rouge-L/mean"] > 0
