"""What the tools write is read by the trainer's own reader, and its configuration takes what lengths says."""

import json
from types import SimpleNamespace

import pytest
import torch

from examples.quickstart.tiny_model import build_tokenizer
from examples.quickstart.world import World
from tests.data_tools.teacher_server import answer_to
from tests.data_tools.teaching import KEY, command, rows_of, teaching, write_prompts
from tests.tiny import byte_tokenizer, write_model
from verl.data_tools.check import main as check
from verl.data_tools.collect import main as collect
from verl.data_tools.compare import main as compare
from verl.data_tools.convert import main as convert
from verl.data_tools.lengths import main as lengths
from verl.data_tools.split import main as split
from verl.trainer.config import compose_config
from verl.utils.dataset.rl_dataset import RLHFDataset

SETTINGS = SimpleNamespace(
    prompt_key="content",
    response_key="teacher_response",
    max_prompt_length=96,
    max_response_length=96,
    truncation="error",
    filter_overlong_prompts=False,
    filter_overlong_prompts_workers=None,
    on_bad_row="error",
    return_raw_chat=False,
    apply_chat_template_kwargs={},
)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_trainer_reads_it(tmp_path, monkeypatch, ending):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts, out = write_prompts(tmp_path / "p.txt", 40), tmp_path / f"teacher.{ending}"
    moods = {"number 3?": "refuse", "number 4?": "length", "number 5?": "empty", "number 6?": "reason"}
    with teaching(tmp_path, by_text=moods) as teacher:
        flags = ("--system_prompt", "Be brief. 请简短。", "--reasoning", "think", "--seed", "1", "--n", "2")
        assert collect(command(prompts, out, teacher.url, *flags)) == 0
    sizes = ("--validation", "0.2", "--judge", "10", "--format", ending)
    assert split([str(out), "--out", str(tmp_path / "sets"), *sizes]) == 0

    tokenizer = build_tokenizer([prompts.read_text(), answer_to("第1个问题")], vocab_size=400)
    texts, answers = [], []
    for name in ("train", "test", "judge"):
        data = RLHFDataset(str(tmp_path / "sets" / f"{name}.{ending}"), tokenizer, SETTINGS)
        for item in data:
            ids = item["teacher_response"][item["teacher_attention_mask"][-96:].bool()]
            texts.append(tokenizer.decode(item["raw_prompt_ids"]))
            answers.append(tokenizer.decode(ids))
            assert torch.equal(ids[-1:], torch.tensor([tokenizer.eos_token_id]))
    # Three prompts have no answer to learn from; the others have two.
    assert len(texts) == 2 * 37 == len(rows_of(out)) and len(set(texts)) == 37
    assert all(
        text.startswith("<|im_start|>system\nBe brief. 请简短。<|im_end|>\n<|im_start|>user\n") for text in texts
    )
    thought = "<think>\nLet me think. 让我想想。\n</think>\n\n"
    assert {text.split("user\n")[1].split("<|im_end|>")[0] for text in texts} == {
        line for number, line in enumerate(prompts.read_text().splitlines()) if number not in (3, 4, 5)
    }
    for text, answer in zip(texts, answers, strict=True):
        prompt = text.split("user\n")[1].split("<|im_end|>")[0]
        assert answer == (thought if "number 6?" in prompt else "") + answer_to(prompt) + tokenizer.eos_token


def test_answers_that_are_there_already_go_through_all_tools_in_order(tmp_path, capsys):
    """convert, check, split, compare, lengths; the trainer takes the settings of the last one's line, and the sets."""
    rows = World(0).teacher_rows("train", 400, seed=0)
    told = [{"instruction": row["content"][0]["content"], "output": row["teacher_response"]} for row in rows]
    source, data, sets = tmp_path / "alpaca.json", tmp_path / "data" / "teacher.parquet", tmp_path / "data"
    source.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    model = str(write_model(tmp_path / "model"))

    assert convert([str(source), "--out", str(data)]) == 0
    assert rows_of(data) == rows
    assert check([str(data), "--model", model, "--fail_on", "bad,empty,secret,duplicate,cut,refused,template"]) == 0
    assert split([str(data), "--out", str(sets), "--validation", "0.1", "--judge", "0.1"]) == 0
    train, test = str(sets / "train.parquet"), str(sets / "test.parquet")
    assert check([train, "--against", test, "--fail_on", "overlap,near_overlap"]) == 0
    assert compare(["--a", train, "--b", test, "--model", model]) == 0
    capsys.readouterr()
    assert lengths(["--data", train, "--val_files", test, "--model", model, "--stage", "seqkd"]) == 0

    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  bash scripts/train/"))
    required = [f"data.train_files={train}", f"actor_rollout_ref.model.path={model}", "trainer.experiment_name=x"]
    config = compose_config([*required, *line.split("--nnodes 1 ")[1].split()]).data
    read = [len(RLHFDataset(file, byte_tokenizer(), config)) for file in (train, test)]
    assert read[1] == 40 and read[0] + read[1] + len(rows_of(sets / "judge.parquet")) == 400
