"""The best checkpoint and the early stop on real models: kept, read by other commands, and exact over a restart."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.running import read_metrics, train
from verl.model_merger.cli import main as merger
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.checkpoint_manager import step_of
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = pytest.mark.e2e

LAST, PATIENCE = 4, 2
# The learning rate is 0 after four steps: the held-out loss falls until then, and is the same ever after.
STOPPING = (
    "stage=seqkd",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    f"actor_rollout_ref.actor.optim.total_training_steps={LAST}",
    "actor_rollout_ref.actor.optim.min_lr_ratio=0",
    "trainer.best_metric=val/sft_loss",
    "trainer.best_mode=min",
    f"trainer.early_stop_patience={PATIENCE}",
    "trainer.test_freq=1",
    "trainer.save_freq=5",
)


def tensors(folder):
    return read_full_tensors(folder / "model")


def assert_same_weights(one, other):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def stopped(run, folder):
    """Twenty steps of SFT that end after six."""
    return train(folder, "stopped", *STOPPING, "trainer.total_training_steps=20", run_with=run_in_process)


def test_it_ends_early_and_keeps_the_best(stopped):
    metrics = read_metrics(stopped)
    losses = [metrics[step]["val/sft_loss"] for step in sorted(metrics)]
    assert len(losses) == LAST + PATIENCE + 1
    assert losses[: LAST + 1] == sorted(losses[: LAST + 1], reverse=True)
    assert losses[LAST:] == [losses[LAST]] * (PATIENCE + 1)
    assert metrics[6]["val/best/value"] == losses[LAST]
    assert metrics[6]["val/best/step"] == LAST
    assert "actor/sft_loss" not in metrics[6], "the last line is the validation that ended it"
    # A regular checkpoint, the best, and the last; what was best before is gone.
    assert sorted(map(step_of, stopped.glob("global_step_*"))) == [4, 5, 6]
    assert step_of(stopped / "best") == LAST
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_the_held_out_loss_is_hugging_faces_of_the_merged_best(stopped, folder, tmp_path):
    """transformers alone on the merged folder: cross-entropy of each teacher token, the mean over all of them."""
    best = str(stopped / "best" / "actor")
    out = ["--target_dir", str(tmp_path / "hf"), "--dtype", "float32"]
    merger(["merge", "--backend", "fsdp", "--local_dir", best, *out])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    losses = []
    for row in map(json.loads, (folder / "val.jsonl").read_text().splitlines()):
        prompt = tokenizer.apply_chat_template(row["content"], add_generation_prompt=True, return_dict=True)
        answer = tokenizer(row["teacher_response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt["input_ids"] + answer[:10]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt["input_ids"]) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer[:10]), reduction="none").tolist()
    value = read_metrics(stopped)[LAST]["val/best/value"]
    assert value == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_the_next_run_starts_from_the_best(stopped, folder):
    model = f"actor_rollout_ref.model.path={stopped}/best/actor"
    again = train(folder, "from_best", "stage=seqkd", model, "trainer.val_only=True", run_with=run_in_process)
    assert read_metrics(again)[0]["val/sft_loss"] == read_metrics(stopped)[LAST]["val/best/value"]


@pytest.mark.parametrize("stop", [3, 5])
def test_an_early_stop_falls_where_it_would_have_without_a_restart(stopped, run, folder, stop):
    """Before the best (3) and when one of two validations has been no better (5)."""
    name = f"parts{stop}"
    parts = train(folder, name, *STOPPING, f"trainer.total_training_steps={stop}", run_with=run_in_process)
    train(folder, name, *STOPPING, "trainer.total_training_steps=20", run_with=run_in_process)
    assert_same_weights(parts / "global_step_6" / "actor", stopped / "global_step_6" / "actor")
    assert_same_weights(parts / "best" / "actor", stopped / "best" / "actor")
    states = [(one / "global_step_6" / "trainer_state.json").read_text() for one in (parts, stopped)]
    assert states[0] == states[1]
    once, again = read_metrics(stopped), read_metrics(parts)
    assert sorted(again) == sorted(once)
    for step in again:
        ours = {key: value for key, value in again[step].items() if key.startswith("val/")}
        assert ours == {key: value for key, value in once[step].items() if key.startswith("val/")}


def test_a_checkpoint_of_the_best_alone_resumes_exactly(run, folder):
    """With a discriminator, replayed and held-out answers, and a moving KL coefficient."""
    settings = (
        *("trainer.test_freq=2", "trainer.val_before_train=True", "trainer.save_freq=-1"),
        *("trainer.best_metric=val/critic/fixed/teacher_score_mean", "critic.held_out_prompts=3"),
        *("critic.replay.capacity=24", "algorithm.use_kl_in_reward=True"),
        *("algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=100"),
    )
    whole = run("whole", *settings, steps=3)
    best = [step for step, data in read_metrics(whole).items() if data.get("val/best/step") == step]
    assert 2 in best, "the teachers' scores rise in training; otherwise this test has nothing to resume"
    source = whole / "global_step_2"
    assert (source / "only_as_best.txt").exists()
    path = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={source}")
    resumed = run("from_the_best", *settings, *path, steps=3)
    for part in ("actor", "critic"):
        assert_same_weights(resumed / "global_step_3" / part, whole / "global_step_3" / part)
    for file in ("trainer_state.json", "replay.safetensors", "held_out.safetensors"):
        files = [one / "global_step_3" / file for one in (resumed, whole)]
        assert files[0].read_bytes() == files[1].read_bytes(), file
    once, again = read_metrics(whole), read_metrics(resumed)
    assert sorted(again) == [2, 3]
    for step in again:
        same = {name for name in once[step] if not name.startswith(("timing", "perf/"))}
        assert {name: again[step][name] for name in same} == {name: once[step][name] for name in same}


def test_a_misspelt_metric_ends_the_run_before_its_first_step(run, folder):
    wrong = ("trainer.best_metric=val/rougeL", "trainer.test_freq=1", "trainer.val_before_train=True")
    with pytest.raises(ValueError, match=r"val/rougeL is not measured by this validation; use val/rouge-L/mean"):
        run("misspelt", *wrong)
