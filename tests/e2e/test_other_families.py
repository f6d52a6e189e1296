"""Warmup and GAD with a discriminator of another family: another class, tokenizer and chat template than the
student's, on Chinese and English text."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from tests.e2e.running import assert_equal_tensors, read_metrics, train
from tests.other_tokenizer import other_tokenizer, write_other_model, write_reward_model
from tests.tiny import write_data, write_model
from verl.model_merger import merge
from verl.models.loading import load_model
from verl.models.tokenizer import load_tokenizer
from verl.tools.judge.__main__ import main as judge
from verl.tools.score.__main__ import main as score
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.sharded import read_full_tensors

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

OTHER = other_tokenizer()
# With everything that keeps answers: they have to be kept, and found again, in the right tokens.
KEEPING = (
    "critic.replay.capacity=24",
    "critic.replay.fraction=0.5",
    "critic.held_out_prompts=4",
    "trainer.test_freq=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("families")
    write_model(path / "base")
    write_other_model(path / "other")
    write_reward_model(path / "rewards")
    write_data(path / "train.jsonl", rows=18)
    write_data(path / "val.jsonl", rows=5)
    yield path
    if dist.is_initialized():
        dist.destroy_process_group()


def run(folder, name, *overrides, steps=4):
    return train(
        folder, name, f"trainer.total_training_steps={steps}", "critic.optim.lr=1e-3", "trainer.val_before_train=False",
        "critic.max_prompt_length=60",
        "critic.discriminator.pooling=last_token", "trainer.save_freq=2", *KEEPING, *overrides, run_with=run_in_process,
    )  # fmt: skip


@pytest.fixture(scope="module")
def warmup(folder):
    return run(folder, "warmup", "stage=warmup", "trainer.critic_warmup=2", f"critic.model.path={folder}/other")


def gad_settings(warmup):
    last = warmup / "global_step_4"
    return ("stage=gad", f"actor_rollout_ref.model.path={last}/actor", f"critic.model.path={last}/critic")


@pytest.fixture(scope="module")
def gad(folder, warmup):
    return run(folder, "gad", *gad_settings(warmup))


def test_both_models_are_trained_and_what_was_read_is_measured(folder, warmup, gad):
    for name, before, after in (
        ("critic", folder / "other", warmup),
        ("critic", warmup / "global_step_4/critic", gad),
        ("actor", folder / "base", warmup),
        ("actor", warmup / "global_step_4/actor", gad),
    ):
        kind = "score" if name == "critic" else "policy"
        trained = read_full_tensors(after / "global_step_4" / name / "model")
        old = load_model(before, kind).state_dict()
        assert not all(torch.equal(tensor, old[key]) for key, tensor in trained.items())
    for step in read_metrics(gad).values():
        if "critic/d_loss" in step:
            # Bytes that are no text become a character of three bytes each: some answers are longer than twice 10.
            assert step["critic/own_tokens/teacher_cut_ratio"] == 0 <= step["critic/own_tokens/student_cut_ratio"] < 1
            assert 0 < step["critic/own_tokens/per_token"] <= 2
    validated = [step for step in read_metrics(gad).values() if "val/critic/d_acc" in step]
    assert validated and all("val/critic/fixed/d_acc" in step for step in validated)


def test_past_answers_are_kept_in_the_discriminators_tokens(gad):
    kept = load_file(gad / "global_step_4" / "replay.safetensors")
    assert kept["input_ids"].shape[1] == 60 and kept["responses"].shape[1:] == (3, 20)
    texts = OTHER.batch_decode(
        [ids[mask.bool()] for ids, mask in zip(kept["input_ids"], kept["attention_mask"], strict=True)]
    )
    assert all(text.startswith("<s>[user] ") and text.endswith("</s>[assistant] ") for text in texts)
    held_out = load_file(gad / "global_step_4" / "held_out.safetensors")
    assert held_out["input_ids"].shape[1] == 28, "those are the student's, and read anew"


def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder, warmup, gad):
    run(folder, "resumed", *gad_settings(warmup), steps=2)
    resumed = run(folder, "resumed", *gad_settings(warmup))

    def numbers(run, step):
        of_time = ("timing", "perf/")
        return {name: value for name, value in read_metrics(run)[step].items() if not name.startswith(of_time)}

    for step in (2, 3):
        once, again = numbers(gad, step), numbers(resumed, step)
        assert again == once and "critic/replay/d_acc" in once
    for part in ("actor/model", "actor/optim", "critic/model", "critic/optim"):
        folders = [one / "global_step_4" / part for one in (resumed, gad)]
        assert_equal_tensors(*map(read_full_tensors, folders))
    for file in ("replay.safetensors", "held_out.safetensors"):
        assert_equal_tensors(load_file(resumed / "global_step_4" / file), load_file(gad / "global_step_4" / file))


def test_the_critic_keeps_its_tokenizer_and_scores_as_hugging_face_does(gad, tmp_path, capsys):
    critic = gad / "global_step_4" / "critic"
    tokenizer = load_tokenizer(critic)
    assert tokenizer.get_vocab() == OTHER.get_vocab() and tokenizer.chat_template == OTHER.chat_template
    prompt, teacher, student = "天空是什么颜色?", "红的。", "It is 3."
    row = {"content": prompt, "teacher_response": teacher, "student_response": student}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "scores.jsonl"
    score(["--critic", str(critic), "--data", str(tmp_path / "answers.jsonl"), "--out", str(out)])
    capsys.readouterr()
    hf = AutoModelForTokenClassification.from_pretrained(merge(critic, tmp_path / "m", dtype=torch.float32)).eval()
    pair = pd.read_json(out, lines=True).iloc[0]
    for side, text in (("teacher", teacher), ("student", student)):
        chat = OTHER.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        begin = OTHER(chat, add_special_tokens=False)["input_ids"]
        answer = [*OTHER(text, add_special_tokens=False)["input_ids"], OTHER.eos_token_id]
        value = hf(torch.tensor([[*begin, *answer]])).logits[0, -1, 0].item()
        assert pair[f"{side}_score"] == pytest.approx(value, abs=1e-5)
        assert pair[f"{side}_tokens"] == len(answer)


def test_a_reward_model_rewards_from_the_first_step_on(folder):
    """GAD takes it without a warmup, with its head."""
    made = run(folder, "rewarded", "stage=gad", f"critic.model.path={folder}/rewards", "critic.optim.lr=0", steps=2)
    head = read_full_tensors(made / "global_step_2" / "critic" / "model")
    given = load_file(folder / "rewards" / "model.safetensors")
    assert torch.equal(head["classifier.weight"], given["score.weight"])
    assert not head["classifier.bias"].any()


def test_the_judge_reads_with_the_tokenizer_of_its_own_model(folder, tmp_path):
    """Students and judge are of two families: lengths and tests are in the judge's tokens."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({**row, "student_response": "no"}) + "\n" for row in rows))
    flags = ["--data", str(folder / "train.jsonl"), "--student", f"file={answers}", "--student", f"base={folder}/base"]
    flags += ["--samples", "1", "--max_response_length", "10", "--folds", "2", "--judge_seeds", "1", "--device", "cpu"]
    judge([*flags, "--out", str(tmp_path / "out"), "--judge_model", str(folder / "other")])
    report = json.loads((tmp_path / "out" / "judge.json").read_text())
    lengths = [len(OTHER(row["teacher_response"], add_special_tokens=False)["input_ids"]) + 1 for row in rows]
    assert report["teacher"]["numbers"]["mean_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    file, base = report["students"]["file"], report["students"]["base"]
    assert file["numbers"]["mean_tokens"] == len(OTHER("no", add_special_tokens=False)["input_ids"]) + 1
    assert base["numbers"]["cut"] > 0.5, "a cut answer gets no EOS of the judge's"
    assert file["two_sample"]["pairs"] == base["two_sample"]["pairs"] == len(rows)
    with pytest.raises(SystemExit, match="expected a language model, to which a fresh score head is given"):
        judge([*flags, "--out", str(tmp_path / "out"), "--judge_model", str(folder / "rewards")])
