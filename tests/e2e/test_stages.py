"""Whole stages on real Ray: what is trained when, what is written, and that it can be read again."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from tests.e2e.metric_names import (
    COMMON_METRICS,
    DISCRIMINATOR_METRICS,
    POLICY_METRICS,
    SEQKD_METRICS,
    VALIDATION_METRICS,
)
from tests.e2e.running import assert_equal_tensors, read_metrics, train
from verl.model_merger.cli import main as merger
from verl.models.loading import load_model
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]


def tensors(run, step, part):
    return read_full_tensors(run / f"global_step_{step}" / part / "model")


@pytest.fixture(scope="module")
def warmup(folder):
    """Twelve steps of stage 2 on one rank, the actor frozen for the first ten, every step saved."""
    return train(
        folder,
        "warmup",
        "stage=warmup",
        f"critic.model.path={folder}/base",
        "critic.optim.lr=1e-3",
        "trainer.critic_warmup=10",
        # So few answers are known by heart at once.
        "critic.balance.enable=False",
        "trainer.total_training_steps=12",
        "trainer.save_freq=1",
        "trainer.test_freq=12",
        f"trainer.validation_data_dir={folder}/answers",
    )


def test_the_actor_is_frozen_for_critic_warmup_steps(warmup, folder):
    base = load_model(folder / "base", "policy").state_dict()
    base.pop("lm_head.weight")  # tied to the embedding
    for step in range(1, 11):  # after steps 0 to 9
        assert_equal_tensors(tensors(warmup, step, "actor"), base)
    changed = tensors(warmup, 11, "actor")  # after step 10
    assert any(not torch.equal(changed[name], base[name]) for name in base)


def test_the_discriminator_is_trained_at_every_step(warmup):
    for step in range(1, 12):
        before, after = tensors(warmup, step, "critic"), tensors(warmup, step + 1, "critic")
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_every_metric_of_the_adversarial_stages_is_logged(warmup):
    metrics = read_metrics(warmup)
    assert sorted(metrics) == list(range(13))
    assert metrics[0].keys() >= DISCRIMINATOR_METRICS | VALIDATION_METRICS | COMMON_METRICS - {"timing_s/update_actor"}
    held_out = {f"val/critic/{kind}{name}" for kind in ("", "fixed/") for name in ("d_acc", "score_diff")}
    assert metrics[0].keys() >= held_out
    # Before training the stored answers are the fresh ones; after it the student writes others.
    for name in ("d_acc", "score_diff", "student_score_mean"):
        assert metrics[0][f"val/critic/fixed/{name}"] == metrics[0][f"val/critic/{name}"]
        assert metrics[12][f"val/critic/fixed/{name}"] != metrics[0][f"val/critic/fixed/{name}"]
    assert metrics[12]["val/critic/fixed/student_score_mean"] != metrics[12]["val/critic/student_score_mean"]
    # While the actor is frozen its log-probs are asked for a few answers alone, for the proof of sync.
    assert not {"actor/pg_loss", "actor/entropy"} & metrics[9].keys()
    assert metrics[10].keys() >= DISCRIMINATOR_METRICS | POLICY_METRICS | COMMON_METRICS
    assert metrics[12].keys() >= VALIDATION_METRICS
    gaps = [data["training/rollout_probs_diff_max"] for step, data in metrics.items() if step < 12]
    assert max(gaps) < 1e-4, "the engine must run on the trainer's weights at every step"


def test_merged_actor_gives_the_trainers_own_greedy_text(warmup, folder, tmp_path):
    """transformers alone, one prompt at a time, on the merged folder; the trainer's answers are from its last step."""
    checkpoint = warmup / "global_step_12" / "actor"
    out = ["--target_dir", str(tmp_path / "hf"), "--dtype", "float32"]
    merger(["merge", "--backend", "fsdp", "--local_dir", str(checkpoint), *out])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    texts = []
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["content"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=10, do_sample=False)
        texts.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    logged = [json.loads(line) for line in (folder / "answers" / "12.jsonl").read_text().splitlines()]
    assert texts == [row["answer"] for row in logged]
    assert any(texts), "empty answers alone would prove nothing"


def test_validations_leave_their_answers_in_parquet(warmup, folder):
    assert sorted(path.name for path in (warmup / "val_samples").iterdir()) == ["step_0.parquet", "step_12.parquet"]
    asked = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    for step in (0, 12):
        written = pq.read_table(warmup / "val_samples" / f"step_{step}.parquet").to_pylist()
        assert [row["prompt"] for row in written] == [row["content"][-1]["content"] for row in asked]
        assert [row["teacher"] for row in written] == [row["teacher_response"] for row in asked]
        dumped = [json.loads(line) for line in (folder / "answers" / f"{step}.jsonl").read_text().splitlines()]
        for row, other in zip(written, dumped, strict=True):
            assert row["step"] == step and row["student"] == other["answer"]
            assert [row[name] for name in ("score", "teacher_score")] == [other["score"], other["teacher_score"]]
            assert row["prompt"] in other["prompt"]
            assert row["finish_reason"] == "stop" or row["tokens"] == 10


def test_merged_critic_gives_the_trainers_own_scores(warmup, folder, tmp_path):
    """The mean of the values at the answer's tokens, computed with transformers alone on the merged folder."""
    checkpoint = warmup / "global_step_12" / "critic"
    out = ["--target_dir", str(tmp_path / "hf"), "--dtype", "float32"]
    merger(["merge", "--backend", "fsdp", "--local_dir", str(checkpoint), *out])
    merger(["test", "--backend", "fsdp", "--local_dir", str(checkpoint), "--test_hf_dir", str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "hf").eval()
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in (folder / "answers" / "12.jsonl").read_text().splitlines()]
    for row, entry in zip(rows, logged, strict=True):
        prompt = tokenizer.apply_chat_template(row["content"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        answer = tokenizer(row["teacher_response"], add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id][:10]
        values = model(torch.tensor([prompt + answer])).logits[0, len(prompt) :, 0]
        assert entry["teacher_score"] == pytest.approx(values.mean().item(), abs=1e-5)


def test_merger_says_what_is_wrong(warmup, folder):
    with pytest.raises(SystemExit, match="already"):
        merger(["merge", "--backend", "fsdp", "--local_dir", str(folder / "base"), "--target_dir", "x"])
    with pytest.raises(SystemExit, match=r"did you mean .*global_step_12/actor"):
        merger(["merge", "--backend", "fsdp", "--local_dir", str(warmup / "global_step_12"), "--target_dir", "x"])
    with pytest.raises(SystemExit, match="fsdp checkpoints only") as refused:
        merger(["merge", "--backend", "megatron", "--local_dir", "x"])
    assert refused.value.code == 2


# Past answers are half of the discriminator's batch: 4 groups of 3; the buffer holds those of two steps.
GAD = (
    "stage=gad",
    "critic.replay.capacity=24",
    "algorithm.task_reward_weight=0.5",
    "trainer.save_freq=2",
    "trainer.test_freq=2",
    "trainer.n_gpus_per_node=2",
    "critic.optim.lr=1e-3",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.horizon=100",
)


@pytest.fixture(scope="module")
def gad(folder, warmup):
    """Four steps of stage 3 on two ranks, from unmerged checkpoint folders."""
    source = warmup / "global_step_12"
    (folder / "reward.py").write_text("def compute_score(prompt, answer, teacher):\n    return len(answer) / 10\n")
    models = (
        f"custom_reward_function.path={folder}/reward.py",
        f"actor_rollout_ref.model.path={source}/actor",
        f"critic.model.path={source}/critic",
    )
    run = train(folder, "gad", *GAD, *models, "trainer.total_training_steps=4")
    return run, models


def test_stages_hand_over_through_unmerged_folders(gad, warmup):
    """The weights that GAD starts from are warmup's: its first validation repeats warmup's last."""
    run, _ = gad
    start, end = read_metrics(run)[0], read_metrics(warmup)[12]
    # Sampled answers differ between one rank and two; the greedy ones and the teacher's do not.
    for name in ("val/rouge-L/mean", "val/sft_loss", "val/critic/teacher_score_mean"):
        assert start[name] == pytest.approx(end[name], abs=1e-5), name


def test_resuming_is_exact(gad, folder):
    """Two steps, a stop, and two more: the same weights, bit for bit, as four steps at once."""
    run, models = gad
    resumed = folder / "runs" / "resumed"
    resumed.mkdir(parents=True)
    shutil.copytree(run / "global_step_2", resumed / "global_step_2")
    (resumed / "latest_checkpointed_iteration.txt").write_text("2")
    train(folder, "resumed", *GAD, *models, "trainer.total_training_steps=4")

    for part in ("actor", "critic"):
        assert_equal_tensors(tensors(resumed, 4, part), tensors(run, 4, part))
        states = [json.loads((r / "global_step_4" / part / "extra_state.json").read_text()) for r in (run, resumed)]
        assert states[0] == states[1]
    assert (resumed / "global_step_4" / "trainer_state.json").read_text() == (
        run / "global_step_4" / "trainer_state.json"
    ).read_text()
    for name in ("replay", "held_out"):
        files = [r / "global_step_4" / f"{name}.safetensors" for r in (run, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()
    once, again = read_metrics(run), read_metrics(resumed)
    assert sorted(again) == [2, 3, 4]
    assert again[2]["critic/replay/fraction"] == 0.5, "a buffer that starts empty would replay nothing yet"
    for step in again:
        same = {name for name in once[step] if not name.startswith(("timing", "perf/"))}
        assert {name: again[step][name] for name in same} == {name: once[step][name] for name in same}


def test_a_resumed_run_takes_todays_learning_rate(gad, folder):
    run, models = gad
    slower = folder / "runs" / "slower"
    slower.mkdir(parents=True)
    shutil.copytree(run / "global_step_2", slower / "global_step_2")
    (slower / "latest_checkpointed_iteration.txt").write_text("2")
    rates = ("actor_rollout_ref.actor.optim.lr=1e-5", "critic.optim.lr=2e-5", "trainer.total_training_steps=3")
    train(folder, "slower", *GAD, *models, *rates)
    metrics = read_metrics(slower)[2]
    assert (metrics["actor/lr"], metrics["critic/lr"]) == (1e-5, 2e-5)


def test_a_checkpoint_of_two_ranks_resumes_on_one(gad, folder):
    run, models = gad
    single = folder / "runs" / "single"
    single.mkdir(parents=True)
    shutil.copytree(run / "global_step_4", single / "global_step_4")
    (single / "latest_checkpointed_iteration.txt").write_text("4")
    one_rank = [*GAD, *models, "trainer.n_gpus_per_node=1", "trainer.val_only=True"]
    train(folder, "single", *one_rank, "trainer.total_training_steps=5")
    once, again = read_metrics(run)[4], read_metrics(single)[4]
    for name in ("val/rouge-L/mean", "val/critic/fixed/score_diff", "val/critic/fixed/student_score_mean"):
        assert again[name] == pytest.approx(once[name], abs=1e-5), name


def test_a_damaged_checkpoint_is_refused(gad, folder):
    run, models = gad
    broken = folder / "broken" / "global_step_2"
    shutil.copytree(run / "global_step_2", broken)
    shard = next((broken / "actor" / "model").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    arguments = (
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={broken}",
        "trainer.total_training_steps=3",
    )
    with pytest.raises(ValueError, match=f"damaged: actor/model/{shard.name}"):
        train(folder, "broken", *GAD, *models, *arguments)


def test_seqkd_logs_its_metrics_and_learns(folder):
    run = train(
        folder,
        "seqkd",
        "stage=seqkd",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "trainer.sft_monitor_freq=1",
        "trainer.total_training_steps=30",
        "trainer.test_freq=30",
        "trainer.logger=[file,tensorboard]",
        "trainer.max_actor_ckpt_to_keep=1",
        "trainer.save_freq=15",
        f"trainer.rollout_data_dir={folder}/rollouts",
    )
    metrics = read_metrics(run)
    assert metrics[0].keys() >= SEQKD_METRICS | VALIDATION_METRICS | COMMON_METRICS
    assert not any(name.startswith("critic/") for name in metrics[0])
    assert metrics[29]["actor/sft_loss"] < 0.7 * metrics[0]["actor/sft_loss"]
    assert metrics[30]["val/rouge-L/mean"] > metrics[0]["val/rouge-L/mean"]
    assert [path.name for path in run.glob("global_step_*")] == ["global_step_30"]
    assert list((run / "tensorboard").iterdir())
    answers = pq.read_table(run / "val_samples" / "step_30.parquet").to_pylist()
    assert [row["score"] for row in answers] == [row["teacher_score"] for row in answers] == [None] * len(answers)
    assert {row["finish_reason"] for row in answers} <= {"stop", "length"}
    mean = sum(row["tokens"] for row in answers) / len(answers)
    assert metrics[30]["val/response_length/mean"] == pytest.approx(mean)
    dumped = [json.loads(line) for line in (folder / "rollouts" / "29.jsonl").read_text().splitlines()]
    assert [len(row["answers"]) for row in dumped] == [3] * 4


def test_too_few_cpus_is_said_at_once(folder):
    with pytest.raises(ValueError, match="not enough resources for 4 worker processes"):
        train(folder, "large", "stage=seqkd", "trainer.n_gpus_per_node=4", "ray_kwargs.ray_init.num_cpus=3")
