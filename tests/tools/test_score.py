"""The offline scorer: numbers by hand, scores equal to the trainer's, and errors that say what to pass."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import byte_tokenizer, scorer, write_model
from tests.workers.updates_setup import settings
from verl.model_merger import merge
from verl.models.answer_models import ScoreModel
from verl.protocol import DataProto
from verl.tools.score.__main__ import main
from verl.tools.score.report import accuracy, calibration, expected_calibration_error, pearson
from verl.trainer.config import Config
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.console import shorten
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.dump import write_jsonl
from verl.workers.critic.dp_critic import DataParallelPPOCritic

EOS = 1
TRAINED = {"loss": "ranking", "pooling": "mean", "exclude_eos": True}
ROWS = [
    ("What is 1?", "One is one.", ["one", "It is one, of course.", "One is one."]),
    ("天空是什么颜色?", "天空是蓝色的。", ["蓝", "天空是红色的。\n我想。", "天空是蓝色的。"]),
    ("Say\ta word.", "Word.", ["", "Word", "词"]),
]
RECORDS = [
    {"content": [{"role": "user", "content": prompt}], "teacher_response": teacher, "answers": answers}
    for prompt, teacher, answers in ROWS
]


def write_critic(folder: Path, seed: int = 1, **entries) -> Path:
    """A tiny discriminator as a Hugging Face folder, with `entries` in its config."""
    model = scorer(seed)
    for name, value in entries.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def critic(tmp_path_factory) -> Path:
    return write_critic(tmp_path_factory.mktemp("critic"), discriminator=TRAINED)


@pytest.fixture(scope="module")
def config() -> Config:
    return settings("ranking")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    write_jsonl(path, RECORDS)
    return path


def score(critic: Path, data: Path, out: Path, *flags: str) -> pd.DataFrame:
    main(["--critic", str(critic), "--data", str(data), "--out", str(out), *flags])
    return pd.read_json(out, lines=True)


def refusal(capsys, *flags: str) -> str:
    """The sentence that the command ends with, and nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        main(list(flags))
    assert stopped.value.code not in (0, None)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err if isinstance(stopped.value.code, int) else stopped.value.code


# ---- statistics, by hand


def test_accuracy_counts_ties_as_wrong():
    assert accuracy(np.array([1.0, -1.0, 0.0, 2.0])) == 0.5


def test_calibration_by_hand():
    # Confidences 0.65 (one right of two), 0.85 (two right of three) and 0.5 (a tie, which is wrong).
    sure, surer = math.log(0.65 / 0.35), math.log(0.85 / 0.15)
    bins = calibration(np.array([sure, -sure, surer, surer, -surer, 0.0]), bins=5)
    assert [part.pairs for part in bins] == [1, 2, 0, 3, 0]
    assert [part.low for part in bins] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert [part.high for part in bins] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert [bins[i].confidence for i in (0, 1, 3)] == pytest.approx([0.5, 0.65, 0.85])
    assert [bins[i].observed for i in (0, 1, 3)] == pytest.approx([0.0, 0.5, 2 / 3])
    assert math.isnan(bins[2].confidence) and math.isnan(bins[2].observed)
    # 1/6 * 0.5 + 2/6 * 0.15 + 3/6 * (0.85 - 2/3)
    assert expected_calibration_error(bins) == pytest.approx(0.225)


def test_bins_are_closed_above():
    # sigmoid(log 3) = 0.75, and sigmoid(100) rounds to 1.
    bins = calibration(np.array([math.log(3.0), 100.0, -100.0]), bins=2)
    assert [part.pairs for part in bins] == [1, 2]
    # |1 - 0.75| / 3 + 2 * |0.5 - 1| / 3
    assert expected_calibration_error(bins) == pytest.approx(1.25 / 3)


def test_pearson_by_hand():
    # Centred: (-1, 0, 1) and (-2, 1, 1) / 3; 1 / (sqrt(2) * sqrt(2 / 3)).
    assert pearson(np.array([1, 2, 3]), np.array([1, 2, 2])) == pytest.approx(math.sqrt(3) / 2)
    assert pearson(np.array([1, 2, 3]), np.array([3, 1, -1])) == pytest.approx(-1)
    assert math.isnan(pearson(np.array([1, 2, 3]), np.array([4, 4, 4])))


def test_shorten():
    assert shorten(" 一\n二\t three ") == "一 二 three"
    assert shorten("abcdef", 4) == "abcd..."
    assert shorten("a\x1b[31mb") == "a\ufffd[31mb"


# ---- scores


@pytest.mark.parametrize(
    ("pooling", "exclude_eos", "limit"),
    [("mean", True, 64), ("mean", False, 12), ("sum", False, 64), ("last_token", True, 64), ("last_token", False, 12)],
)
def test_scores_are_the_trainers(config, critic, data, tmp_path, pooling, exclude_eos, limit):
    """The batch from the trainer's dataset through the trainer's critic, in fewer micro-batches."""
    tokenizer = byte_tokenizer()
    dataset = RLHFDataset(
        data,
        tokenizer,
        dataclasses.replace(config.data, max_prompt_length=64, max_response_length=limit),
    )
    batch = DataProto.from_single_dict(collate_fn([dataset[row] for row in range(len(dataset))]))
    responses = torch.zeros(len(ROWS), 3, limit, dtype=torch.long)
    mask = torch.zeros_like(responses)
    for row, (_, _, answers) in enumerate(ROWS):
        for number, answer in enumerate(answers):
            ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS][:limit]
            responses[row, number, : len(ids)], mask[row, number, : len(ids)] = torch.tensor(ids), 1
    batch.union(DataProto.from_dict({"responses": responses, "response_mask": mask}))
    how = dataclasses.replace(config.critic.discriminator, pooling=pooling, exclude_eos=exclude_eos)
    judge = DataParallelPPOCritic(
        dataclasses.replace(config.critic, discriminator=how), ScoreModel(scorer()), None, EOS
    )
    expected = judge.compute_scores(batch)

    flags = ["--pooling", pooling, "--exclude_eos" if exclude_eos else "--include_eos", "--max_tokens", "60"]
    table = score(critic, data, tmp_path / "scores.jsonl", *flags, "--max_response_length", str(limit))
    for name, column in (("scores", "score"), ("raw_scores", "raw_score"), ("score_tokens", "score_tokens")):
        student = expected[f"student_{name}"]
        np.testing.assert_allclose(table[f"student_{column}"], student.flatten(), atol=1e-5, rtol=1e-5)
        teacher = expected[f"teacher_{name}"].expand_as(student).flatten()
        np.testing.assert_allclose(table[f"teacher_{column}"], teacher, atol=1e-5, rtol=1e-5)
    assert table["student_tokens"].tolist() == mask.sum(-1).flatten().tolist()
    assert table["prompt_tokens"].tolist() == batch.batch["attention_mask"].sum(-1).repeat_interleave(3).tolist()


def test_identical_texts_have_identical_scores(critic, data, tmp_path):
    # A budget of one token: every sequence is alone in its forward.
    for tokens in ("1", "16384"):
        table = score(critic, data, tmp_path / "scores.jsonl", "--max_tokens", tokens)
        same = table[(table["answer"] == 2) & (table["group"] < 2)]
        assert len(same) == 2 and (same["score_diff"] == 0).all()
        assert (table["score_diff"] != 0).sum() == len(table) - 2


def test_table_says_where_each_answer_stands(critic, tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    pd.DataFrame(RECORDS[:2]).to_parquet(first)
    # A prompt as text is one user message, an answer as text is one answer; the default column is another.
    write_jsonl(second, [{"content": ROWS[1][0], "teacher_response": ROWS[1][1], "response": ROWS[1][2][0]}])
    out = tmp_path / "new" / "scores.parquet"
    main(["--critic", str(critic), "--data", str(first), str(second), "--out", str(out)])
    table = pd.read_parquet(out)
    assert table[["group", "row", "answer"]].to_numpy().tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2], [2, 0, 0],
    ]  # fmt: skip
    assert table["file"].tolist() == [str(first)] * 6 + [str(second)]
    columns = ["score_diff", "prompt_tokens", "teacher_raw_score", "student_score_tokens"]
    assert table[columns].iloc[6].tolist() == table[columns].iloc[3].tolist()


def test_rollout_dumps_find_their_prompts(critic, data, tmp_path):
    dump = tmp_path / "7.jsonl"
    write_jsonl(dump, [{"index": n, "teacher": ROWS[n][1], "answers": ROWS[n][2]} for n in (2, 0)])
    scored = score(critic, dump, tmp_path / "dump.jsonl", "--prompts", str(data))
    whole = score(critic, data, tmp_path / "whole.jsonl")
    expected = pd.concat([whole[whole["group"] == 2], whole[whole["group"] == 0]])
    np.testing.assert_allclose(scored["score_diff"], expected["score_diff"], atol=1e-6)


def test_checkpoint_folder_and_merged_folder_give_the_same(tmp_path, data):
    module = ScoreModel(scorer())
    module.hf.config.discriminator = TRAINED
    optimizer = torch.optim.AdamW(module.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(module.hf, optimizer, schedule, byte_tokenizer(), compute_dtype=torch.float32)
    checkpoint = tmp_path / "global_step_3" / "critic"
    manager.save_checkpoint(checkpoint)
    merged = merge(checkpoint, tmp_path / "merged")
    tables = [score(folder, data, tmp_path / "scores.jsonl") for folder in (checkpoint, merged)]
    pd.testing.assert_frame_equal(*tables)
    assert (tables[0]["student_score_tokens"] <= tables[0]["student_tokens"]).all()


def test_a_critic_keeps_its_sliding_windows(critic, data, tmp_path):
    windows = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2, "discriminator": TRAINED}
    whole = score(critic, data, tmp_path / "scores.jsonl")
    for window, same in ((128, True), (2, False)):
        windowed = write_critic(tmp_path / f"window{window}", sliding_window=window, **windows)
        table = score(windowed, data, tmp_path / "scores.jsonl")
        assert np.allclose(table["student_score"], whole["student_score"], atol=1e-5) == same


def test_dtype(critic, data, tmp_path):
    exact, rounded = (score(critic, data, tmp_path / "s.jsonl", "--dtype", name) for name in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded["student_score"], exact["student_score"], atol=0.1)
    assert (rounded["student_score"] != exact["student_score"]).any()


# ---- the report


def test_report(critic, data, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    table = score(critic, data, out, "--show", "1", "--bins", "2")
    report = capsys.readouterr().out
    d = table["score_diff"]
    assert f"critic  {critic}: mean pooling, EOS excluded, trained with ranking" in report
    assert f"{data}: 3 prompts, 9 student answers" in report
    assert f"accuracy (teacher strictly above): {(d > 0).mean():.4f} of 9 pairs" in report
    assert f"{d.mean():.4f}{d.std(ddof=0):>12.4f}" in report
    assert (
        f"student score with its tokens         {table['student_score'].corr(table['student_tokens']):+.4f}" in report
    )
    gap = table["teacher_tokens"] - table["student_tokens"]
    assert f"d with teacher minus student tokens   {d.corr(gap):+.4f}" in report
    for place in (d.idxmax(), d.idxmin()):
        prompt, teacher, answers = ROWS[table["row"][place]]
        assert f"1. d {d[place]:+.4f}   {data}, row {table['row'][place]}, answer {table['answer'][place]}" in report
        assert all(shorten(text) in report for text in (prompt, teacher, answers[table["answer"][place]]))
    assert f"wrote 9 pairs to {out}" in report


def test_one_pair_is_enough(critic, tmp_path, capsys):
    data = tmp_path / "one.jsonl"
    write_jsonl(data, [{"content": "问?", "teacher_response": "答", "answer": "不"}])
    main(["--critic", str(critic), "--data", str(data), "--show", "0"])
    report = capsys.readouterr().out
    assert report.count("undefined: no spread") == 2 and "separated" not in report


def test_as_a_command(critic, data):
    command = [sys.executable, "-m", "verl.tools.score", "--critic", str(critic), "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "天空是蓝色的。" in done.stdout and "expected calibration error" in done.stdout


def test_cut_answers_are_counted(critic, data, capsys):
    main(["--critic", str(critic), "--data", str(data), "--max_response_length", "12"])
    # With EOS, "One is one." has 12 tokens; the teacher's Chinese answer is cut, and three of the student's.
    assert "cut     0 prompts and 4 answers" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "prompt", "teacher", "student"), [("text", 9, 8, 2), ("token", 5, 4, 2)])
def test_names_of_special_tokens_are_text_or_tokens(critic, tmp_path, mode, prompt, teacher, student):
    """a<eos>b is 7 letters or 3 tokens, and one more around it; an answer's own EOS text at its end is its EOS."""
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, [{"content": "a<eos>b", "teacher_response": "a<eos>b", "answer": "a<eos>"}])
    table = score(critic, data, tmp_path / "scores.jsonl", "--special_token_text", mode)
    counts = table[["prompt_tokens", "teacher_tokens", "student_tokens"]].iloc[0].tolist()
    assert counts == [prompt, teacher, student]


def test_prompts_are_refused_or_cut(critic, data, tmp_path, capsys):
    flags = ["--critic", str(critic), "--data", str(data), "--max_prompt_length", "13"]
    message = refusal(capsys, *flags)
    assert f"{data}, row 1: the prompt has 24 tokens, more than --max_prompt_length=13" in message
    table = score(critic, data, tmp_path / "cut.jsonl", "--max_prompt_length", "13", "--truncation", "left")
    assert table["prompt_tokens"].tolist() == [12] * 3 + [13] * 6
    assert "cut     1 prompts and 0 answers" in capsys.readouterr().out


# ---- errors


def test_a_critic_without_settings_needs_them(tmp_path, data, capsys):
    critic = write_critic(tmp_path / "plain")
    flags = ["--critic", str(critic), "--data", str(data)]
    message = refusal(capsys, *flags)
    assert "pass --pooling last_token, mean or sum and --include_eos or --exclude_eos" in message
    assert "pass --include_eos or --exclude_eos" in refusal(capsys, *flags, "--pooling", "mean")
    main([*flags, "--pooling", "mean", "--include_eos"])
    assert "mean pooling, EOS included\n" in capsys.readouterr().out


def test_what_is_no_critic_is_refused(tmp_path, data, capsys):
    model = write_model(tmp_path / "step" / "actor")
    message = refusal(capsys, "--critic", str(model), "--data", str(data))
    assert "trained score head" in message and "Qwen2ForCausalLM" in message and "pass global_step_N/critic" in message
    inside = write_critic(tmp_path / "step" / "critic")
    assert f"pass {inside}" in refusal(capsys, "--critic", str(tmp_path / "step"), "--data", str(data))
    weights = load_file(inside / "model.safetensors")
    head = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in weights.items() if "score" in name}
    save_file(weights | head, inside / "model.safetensors", metadata={"format": "pt"})
    assert "got 2 labels in" in refusal(capsys, "--critic", str(inside), "--data", str(data))
    assert "does not exist" in refusal(capsys, "--critic", str(tmp_path / "none"), "--data", str(data))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"content": None}, "expected prompts in column 'content', the columns are 'teacher_response', 'answers'"),
        ({"teacher_response": None}, "expected the teacher's answers in column 'teacher_response'"),
        ({"answers": None}, "column 'answers' or 'responses' or 'response' or 'answer' or 'student_response'"),
        ({"content": None, "index": 0}, "pass the files it was trained on with --prompts"),
        ({"content": None, "rouge": 0.5}, "a validation dump has its prompts as decoded text only"),
        ({"content": " "}, "row 0: 'content' has no chat messages"),
        ({"content": [{"role": "user"}]}, "row 0: a message of 'content' is not {role: text, content: text}"),
        ({"teacher_response": ""}, "row 0: the answer in 'teacher_response' is empty"),
        ({"answers": []}, "row 0: 'answers' is not a text or a list of texts but []"),
        ({"answers": ["a", 3]}, "row 0: answer 1 in 'answers' is not text but int"),
        ({"answers": ["\ud800"]}, "row 0: the tokenizer or its chat template refuses it"),
        ({"answers": ["x" * 300]}, "row 0, answer 0: 12 prompt and 301 answer tokens are 313, more than the critic's"),
    ],
)
def test_data_that_cannot_be_scored(critic, tmp_path, capsys, changes, expected):
    record = {key: value for key, value in {**RECORDS[0], **changes}.items() if value is not None}
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps(record) + "\n")
    message = refusal(capsys, "--critic", str(critic), "--data", str(data))
    assert str(data) in message and expected in message


def test_all_bad_rows_are_listed(critic, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    write_jsonl(data, [RECORDS[0], *({**RECORDS[0], "answers": None} for _ in range(12))])
    message = refusal(capsys, "--critic", str(critic), "--data", str(data))
    assert "12 of 13 rows cannot be scored" in message and "row 10" in message and "... and 2 more" in message


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"index": 3, "answers": ["a"]}, "expected an `index` from 0 to 2"),
        ({"index": 0, "teacher": "another", "answers": ["a"]}, "do not belong together"),
    ],
)
def test_prompts_that_do_not_belong(critic, data, tmp_path, capsys, record, expected):
    dump = tmp_path / "dump.jsonl"
    write_jsonl(dump, [record])
    assert expected in refusal(capsys, "--critic", str(critic), "--data", str(dump), "--prompts", str(data))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "nowhere.jsonl"], "error: no such data file"),
        (["--out", "scores.csv"], "--out: expected a file that ends in .parquet or .jsonl, got scores.csv"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got tpu"),
        (["--device", "cuda:99"], "CUDA devices, got cuda:99; pass cpu"),
        (["--answer_key", "mine"], "expected the student's answers in column 'mine'"),
        (["--max_tokens", "0"], "expected a whole number from 1, got '0'"),
        (["--show", "-1"], "expected a whole number from 0, got '-1'"),
        (["--apply_chat_template_kwargs", "[1]"], "expected a JSON object such as"),
        (["--exclude_eos", "--include_eos"], "not allowed with argument"),
    ],
)
def test_flags_that_cannot_be(critic, data, capsys, flags, expected):
    assert expected in refusal(capsys, "--critic", str(critic), "--data", str(data), *flags)


def test_a_diverged_critic_is_named(tmp_path, data, capsys):
    model = scorer()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.config.discriminator = TRAINED
    model.save_pretrained(tmp_path / "nan")
    byte_tokenizer().save_pretrained(tmp_path / "nan")
    assert "expected finite scores" in refusal(capsys, "--critic", str(tmp_path / "nan"), "--data", str(data))
