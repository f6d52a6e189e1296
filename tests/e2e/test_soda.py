"""SODA end to end: by its script on real Ray; in this process, what a restart and a new epoch must not change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from tests.e2e.metric_names import COMMON_METRICS, VALIDATION_METRICS
from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors
from verl.workers.actor.pairs import PairPolicy
from verl.workers.rollout.hf_rollout import HFRollout

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
SODA_METRICS = {
    *("actor/soda_loss", "actor/soda_acc", "actor/soda_margin", "actor/soda_chosen_reward"),
    *("actor/soda_rejected_reward", "actor/soda_equal_frac", "actor/grad_norm", "actor/lr"),
    *(f"response_length/{kind}" for kind in ("mean", "max", "min", "clip_ratio")),
}
# Of the 18 rows, batches of 4: the second epoch begins in the middle of step 4, and the third with step 9.
STEPS = 10


@pytest.fixture(scope="module")
def soda(folder):
    """`soda(name, *overrides)`: a run on one rank in this process; returns its folder."""

    def start(name, *overrides, steps=STEPS):
        settings = ("stage=soda", "actor_rollout_ref.rollout.n=1", f"trainer.total_training_steps={steps}")
        quiet = ("trainer.test_freq=-1", "trainer.val_before_train=False")
        return train(folder, name, *settings, *quiet, *overrides, run_with=run_in_process)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def calls(monkeypatch):
    """What was generated, as numbers of prompts, and whose log-probs of how many pairs were computed."""
    seen = []
    generate, log_prob = HFRollout.generate, PairPolicy.compute_log_prob

    def counted_generate(self, prompts, *args, **more):
        seen.append(("answers", len(prompts)))
        return generate(self, prompts, *args, **more)

    def counted_log_prob(self, data):
        seen.append(("reference" if self.actor.actor_optimizer is None else "policy", len(data)))
        return log_prob(self, data)

    monkeypatch.setattr(HFRollout, "generate", counted_generate)
    monkeypatch.setattr(PairPolicy, "compute_log_prob", counted_log_prob)
    return seen


def weights(run, step):
    return read_full_tensors(run / f"global_step_{step}" / "actor" / "model")


def test_answers_are_written_once_and_no_reference_is_kept(soda, calls):
    metrics = read_metrics(soda("once"))
    assert calls == [("answers", 18), ("policy", 18)]
    assert metrics[0].keys() >= SODA_METRICS | COMMON_METRICS - {"timing_s/gen"}
    # The policy is its own reference still.
    assert metrics[0]["actor/soda_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(metrics[0]["actor/soda_margin"]) < 1e-5
    assert metrics[0]["training/rollout_probs_diff_max"] < 1e-4
    last = metrics[STEPS - 1]
    assert last["actor/soda_loss"] < 0.3 and last["actor/soda_acc"] == 1
    assert last["actor/soda_chosen_reward"] > 0 > last["actor/soda_rejected_reward"]
    assert not any(name.startswith(("critic/", "timing_s/gen", "timing_s/ref")) for name in last)


def test_an_epoch_is_answered_by_the_weights_at_its_beginning(soda, calls, folder):
    """At steps 0, 4 and 9; the reference stays the first weights. Until step 4 it is the run of `once`."""
    dumps = {name: folder / f"rollouts {name}" for name in ("first", "anew")}
    first = soda("first", "trainer.save_freq=4", f"trainer.rollout_data_dir={dumps['first']}")
    assert calls == [("answers", 18), ("policy", 18)]
    calls.clear()
    anew = soda("anew", "soda.resample=epoch", "trainer.save_freq=4", f"trainer.rollout_data_dir={dumps['anew']}")
    assert calls == [("answers", 18), ("reference", 18)] * 3
    assert_equal_tensors(weights(anew, 4), weights(first, 4))
    same, other = read_metrics(first), read_metrics(anew)
    assert other[3]["actor/soda_loss"] == same[3]["actor/soda_loss"]
    assert other[4]["actor/soda_loss"] != same[4]["actor/soda_loss"]
    rows = [[json.loads(line) for line in (dump / "4.jsonl").read_text().splitlines()] for dump in dumps.values()]
    # One row may stand in a batch twice, as an epoch's last and the next one's first.
    assert [row["index"] for row in rows[0]] == [row["index"] for row in rows[1]]
    assert [one["answers"] == other["answers"] for one, other in zip(*rows, strict=True)].count(True) == 2
    stored = load_file(anew / f"global_step_{STEPS}" / "rejected.safetensors")
    assert stored["epoch"] == 2 and sorted(stored["index"].tolist()) == list(range(18))


@pytest.mark.parametrize("stop", [3, 5, 9])
@pytest.mark.parametrize("resample", ["once", "epoch"])
def test_resuming_is_exact(soda, calls, folder, resample, stop):
    """Before, just after and exactly at an epoch's end: the same weights and metrics, and nothing written again."""
    whole = folder / "runs" / f"whole {resample}"
    settings = (f"soda.resample={resample}", "trainer.save_freq=1")
    if not whole.is_dir():
        soda(whole.name, *settings)
    name = f"stopped {resample} {stop}"
    stopped = folder / "runs" / name
    soda(name, *settings, steps=stop)
    calls.clear()
    soda(name, *settings)
    drawn = {"once": 0, "epoch": {3: 2, 5: 1, 9: 1}[stop]}[resample]
    assert calls == [("answers", 18), ("reference", 18)] * drawn
    assert_equal_tensors(weights(stopped, STEPS), weights(whole, STEPS))
    files = [run / f"global_step_{STEPS}" / "rejected.safetensors" for run in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
    once, again = read_metrics(whole), read_metrics(stopped)
    assert sorted(again) == list(range(STEPS))
    for step, metrics in again.items():
        same = {name for name in metrics if not name.startswith(("timing", "perf/"))}
        assert {name: once[step][name] for name in same} == {name: metrics[name] for name in same}


def test_another_stages_checkpoint_is_not_resumed_from(soda, folder):
    run = train(
        folder, "mixed", "stage=seqkd", "trainer.total_training_steps=1", "trainer.test_freq=-1",
        "trainer.val_before_train=False", run_with=run_in_process,
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"no rejected\.safetensors, so it is another stage's"):
        soda("mixed")
    shutil.rmtree(run)


def test_a_pruned_actor_takes_its_rejected_answers_along(soda):
    run = soda("pruned", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=1", steps=3)
    assert [path.name for path in run.glob("global_step_*")] == ["global_step_3"]
    assert (run / "global_step_3" / "rejected.safetensors").is_file()


def test_greedy_answers_and_an_sft_term(soda):
    run = soda("greedy", "actor_rollout_ref.rollout.do_sample=False", "soda.sft_coef=0.5")
    metrics = read_metrics(run)
    assert metrics[STEPS - 1]["actor/sft_loss"] < metrics[0]["actor/sft_loss"] - 0.1
    assert metrics[0]["training/rollout_probs_diff_max"] < 1e-4


@pytest.mark.distributed
def test_the_script(folder):
    """On two ranks, with validation before and after."""
    command = [
        *("bash", str(REPOSITORY / "scripts" / "train" / "gpt5-8b-soda.sh"), "--model", str(folder / "base")),
        *("--exp_name", "script", "--nnodes", "1", "trainer.device=cpu", "data.train_batch_size=4"),
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/val.jsonl",
        *("data.max_prompt_length=28", "data.max_response_length=10", "trainer.total_training_steps=4"),
        *("actor_rollout_ref.actor.optim.lr=1e-3", "trainer.logger=[file]", "soda.resample=epoch"),
    ]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "N_GPUS_PER_NODE": "2"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "SODA" in done.stderr and "18 answers to be rejected" in done.stderr
    run = folder / "checkpoints" / "gad" / "script"
    metrics = read_metrics(run)
    assert metrics[0].keys() >= SODA_METRICS | VALIDATION_METRICS | COMMON_METRICS - {"timing_s/gen"}
    assert metrics[4].keys() >= VALIDATION_METRICS
    assert metrics[3]["actor/soda_loss"] < metrics[0]["actor/soda_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (run / "global_step_4" / "rejected.safetensors").is_file()
