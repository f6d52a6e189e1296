"""Whether an answer ends: a student of answers of very different lengths, and rewards that pay for never ending.

The student first learns to end, by SFT. Then every character is rewarded, as a discriminator that has learned how the
student's endings look rewards what has no ending. Compared like others, cut answers win and the student stops to stop.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.distributed as dist

from tests.e2e.running import read_metrics, train
from tests.tiny import byte_tokenizer, causal_lm, write_model
from verl.trainer.in_process import run_in_process

pytestmark = pytest.mark.e2e

WIDTH = 20
STEPS = 150
TOKENS = (f"data.max_response_length={WIDTH}", "data.train_batch_size=8", "actor_rollout_ref.rollout.n=4")
QUIET = ("trainer.test_freq=-1", "trainer.val_before_train=False", "trainer.save_freq=-1")


def write_answers(path, rows: int, seed: int):
    """Answers of 2 to 16 characters, whatever was asked."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for row in range(rows):
            answer = "ha" * draw.randint(1, 8)
            content = [{"role": "user", "content": f"{row}?"}]
            file.write(json.dumps({"content": content, "teacher_response": answer}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, and a student that has learned to end its answers."""
    path = tmp_path_factory.mktemp("endings")
    write_model(path / "base")
    write_answers(path / "train.jsonl", 64, seed=1)
    write_answers(path / "val.jsonl", 8, seed=2)
    sft = ("stage=seqkd", "actor_rollout_ref.actor.optim.lr=3e-3", "trainer.total_training_steps=120")
    train(path, "sft", *sft, *TOKENS, *QUIET, run_with=run_in_process)
    (path / "length.py").write_text("def compute_score(prompt, answer, teacher):\n    return len(answer)\n")
    yield path
    if dist.is_initialized():
        dist.destroy_process_group()


def cut_ratios(folder, name, *overrides) -> list[float]:
    """The share of cut answers, step by step, under GAD from the student that has learned to end."""
    student = folder / "runs" / "sft" / "global_step_120" / "actor"
    run = train(
        folder,
        name,
        "stage=warmup",
        "trainer.critic_warmup=1",
        f"trainer.total_training_steps={STEPS}",
        "critic.optim.lr=1e-3",
        "critic.held_out_prompts=0",
        "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.actor.sft_anchor_coef=0",  # it holds even the student that is compared like others
        *TOKENS,
        *QUIET,
        *overrides,
        f"actor_rollout_ref.model.path={student}",
        f"critic.model.path={folder}/base",
        run_with=run_in_process,
    )
    return [data["response_length/cut_ratio"] for _, data in sorted(read_metrics(run).items())]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("mode", "wins"), [("keep", True), ("lowest", False)])
def test_cut_answers_cannot_win_unless_they_are_compared_like_others(folder, mode, wins):
    reward = (f"custom_reward_function.path={folder}/length.py", "algorithm.task_reward_weight=10")
    ratios = cut_ratios(folder, mode, *reward, f"algorithm.cut_answers={mode}")
    assert mean(ratios[:5]) < 0.3, "the student must know how to end"
    assert (mean(ratios[-20:]) > 0.9) == wins
    if not wins:
        # Answers grow towards the limit all the same, and learn to end before it.
        assert mean(ratios[-20:]) < 0.3


def test_by_default_adversarial_training_does_not_unlearn_the_end(folder):
    ratios = cut_ratios(folder, "default", "algorithm.cut_answers=lowest")
    assert mean(ratios[-20:]) < mean(ratios[:5]) + 0.1


def test_an_answer_that_ends_in_another_eos_of_the_model_has_ended(folder):
    """A student that writes "a" and then "#", which its generation config counts as an end and its tokenizer does not
    know as one."""
    tokenizer = byte_tokenizer()
    a, other = tokenizer("a#")["input_ids"]
    model = causal_lm(tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[a] = -1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[a], model.lm_head.weight[other] = 1.0, -1.0
    model.generation_config.eos_token_id = [1, other]
    model.save_pretrained(folder / "hashes")
    tokenizer.save_pretrained(folder / "hashes")
    run = train(
        folder,
        "other-eos",
        "stage=warmup",
        "trainer.critic_warmup=1",
        "trainer.total_training_steps=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=1",
        f"trainer.rollout_data_dir={folder}/hash-answers",
        f"actor_rollout_ref.model.path={folder}/hashes",
        f"critic.model.path={folder}/base",
        *TOKENS,
        run_with=run_in_process,
    )
    metrics = read_metrics(run)
    assert metrics[0]["response_length/mean"] == 2 and metrics[0]["response_length/cut_ratio"] == 0
    assert metrics[1]["val/response_length/mean"] == 2
    rows = [json.loads(line) for line in (folder / "hash-answers" / "0.jsonl").read_text().splitlines()]
    assert {answer for row in rows for answer in row["answers"]} == {"a"}, "the end is no part of the text"
