"""Families with windows, capped scores and logits, sinks and linear attention through SeqKD, warmup and GAD: students
and discriminators, packed, with rows that are longer than the windows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from tests.e2e.running import read_metrics, train
from tests.recent_families import FAMILIES, WINDOW, recent
from tests.tiny import byte_tokenizer, write_data
from verl.models.loading import load_model
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

SHORT = (
    "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "actor_rollout_ref.rollout.n=2",
)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_three_stages(family, tmp_path, caplog):
    recent(family).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write_data(tmp_path / "train.jsonl", rows=8)
    write_data(tmp_path / "val.jsonl", rows=2)

    def run(stage: str, *overrides: str):
        return train(tmp_path, stage, f"stage={stage}", *SHORT, *overrides, run_with=run_in_process)

    def last(folder, part):
        return folder / "global_step_2" / part

    caplog.set_level("INFO")
    seqkd = run("seqkd")
    costs = family in ("gemma2", "qwen3_next", "qwen3_5")
    assert ("all else is packed" in caplog.text) == costs
    student = f"actor_rollout_ref.model.path={last(seqkd, 'actor')}"
    warmup = run("warmup", student, f"critic.model.path={last(seqkd, 'actor')}", "critic.optim.lr=1e-3")
    models = (f"actor_rollout_ref.model.path={last(warmup, 'actor')}", f"critic.model.path={last(warmup, 'critic')}")
    gad = run("gad", *models, "critic.optim.lr=1e-3")

    for folder, part, kind, before in (
        (seqkd, "actor", "policy", tmp_path / "base"),
        (warmup, "critic", "score", last(seqkd, "actor")),
        (gad, "actor", "policy", last(warmup, "actor")),
        (gad, "critic", "score", last(warmup, "critic")),
    ):
        trained, old = read_full_tensors(last(folder, part) / "model"), load_model(before, kind).state_dict()
        still = [name for name, tensor in trained.items() if torch.equal(tensor, old[name])]
        assert not any("self_attn" in name or "linear_attn" in name for name in still), still
    for folder in (seqkd, warmup, gad):
        for step in read_metrics(folder).values():
            assert all(math.isfinite(value) for value in step.values())
    steps = read_metrics(gad).values()
    # Transformers' own generation, from a cache: the log-probs that it sampled with are the packed forward's.
    gaps = [step["training/rollout_probs_diff_max"] for step in steps if "training/rollout_probs_diff_max" in step]
    assert gaps and max(gaps) < 1e-4
    assert any(step.get("prompt_length/mean", 0) + step.get("response_length/mean", 0) > 2 * WINDOW for step in steps)
