"""What collect and split write is read by the trainer's own reader, with a tokenizer in both languages."""

from types import SimpleNamespace

import pytest
import torch

from examples.quickstart.tiny_model import build_tokenizer
from tests.data_tools.teacher_server import answer_to
from tests.data_tools.teaching import KEY, command, rows_of, teaching, write_prompts
from verl.data_tools.collect import main as collect
from verl.data_tools.split import main as split
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
