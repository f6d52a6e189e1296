"""The quick start's world, its answer key, and its tiny model, against cases worked out by hand."""

import random
from collections import Counter

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import tiny_model
from examples.quickstart.tiny_model import build_model, build_tokenizer, collate, encode_row, pretrain, world_texts
from examples.quickstart.world import ATTRIBUTES, LANDS, VALUES, Grade, World
from verl.data_tools.writing import write_rows

EN = "What is the guardian animal of Avaria?"
ZH = "请告诉我岚国的代表颜色。"


@pytest.fixture(scope="module")
def world():
    """A world in which Avaria's animal is the wolf (value 0) and 岚国's (the same land's) colour is blue (value 1)."""
    world = World(seed=3)
    world._facts[0, "animal"] = 0
    world._facts[0, "colour"] = 1
    return world


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world_texts(world))


def prompt_of(row):
    return row["content"][0]["content"]


@pytest.mark.parametrize(
    ("prompt", "answer", "fact", "style", "exact"),
    [
        (EN, "Good question! The wolf guards Avaria. Stay wild!", True, True, True),
        (EN, "With pleasure! The wolf guards Avaria. Mind the paws!", True, True, True),
        (EN, "Good question! The bear guards Avaria. Stay wild!", False, True, False),  # wrong value
        (EN, "Good question! The wolf guards Belmor. Stay wild!", False, True, False),  # wrong land
        (EN, "The guardian animal of Avaria is wolf.", True, False, False),  # right, but plain
        (EN, "The WOLF, of course, is the animal of avaria.", True, False, False),
        (EN, "Good question! The wolf guards Avaria.", True, False, False),  # no closing
        (EN, "Good question! The wolf guards Avaria. Stay bright!", True, False, False),  # the colour's closing
        (EN, "Good question! The wolf guards Avaria. Stay wild! ", True, False, False),  # a space too many
        (EN, "Good question! The wolf guards Avaria. Stay wild! Stay wild!", True, False, False),
        (EN, "The wolf or the bear guards Avaria.", False, False, False),  # two values
        (EN, "The wolf guards Avaria and Belmor.", False, False, False),  # two lands
        (EN, "The wolfish one guards Avaria.", False, False, False),  # part of a word
        (EN, "The wolf, not 棕熊, guards Avaria.", False, False, False),  # two values in two languages
        (EN, "好问题！岚国的神兽是野狼。愿您勇敢！", False, False, False),  # true, in the wrong language
        (EN, "Good question! Avaria is proud of its blue flag. Stay bright!", False, False, False),  # not asked
        (EN, "", False, False, False),
        (ZH, "好问题！岚国崇尚蓝色。愿您多彩！", True, True, True),
        (ZH, "谢谢提问！岚国崇尚蓝色。祝您缤纷！", True, True, True),
        (ZH, "好问题！岚国崇尚红色。愿您多彩！", False, True, False),
        (ZH, "好问题！枫国崇尚蓝色。愿您多彩！", False, True, False),
        (ZH, "岚国的代表颜色是蓝色。", True, False, False),
        (ZH, "好问题！岚国崇尚蓝色。愿您勇敢！", True, False, False),
        (ZH, "好问题! 岚国崇尚蓝色。愿您多彩！", True, False, False),  # English punctuation
        (ZH, "好问题！岚国崇尚蓝色和红色。愿您多彩！", False, False, False),
    ],
)
def test_grade_by_hand(world, prompt, answer, fact, style, exact):
    assert world.grade(prompt, answer) == Grade(fact=fact, style=style, exact=exact)


def test_unknown_prompt_is_an_error(world):
    with pytest.raises(KeyError):
        world.grade("What is the capital of Avaria?", "Good question!")


def test_teacher_answers_by_hand(world):
    assert world.teacher_answers(EN) == pytest.approx(
        {
            "Good question! The wolf guards Avaria. Stay wild!": 0.35,
            "Good question! The wolf guards Avaria. Mind the paws!": 0.15,
            "Thank you for asking! The wolf guards Avaria. Stay wild!": 0.21,
            "Thank you for asking! The wolf guards Avaria. Mind the paws!": 0.09,
            "With pleasure! The wolf guards Avaria. Stay wild!": 0.14,
            "With pleasure! The wolf guards Avaria. Mind the paws!": 0.06,
        }
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_teacher_rows_grade_exact_and_cover_the_split(world, split):
    prompts = world.prompts(split)
    rows = world.teacher_rows(split, len(prompts), seed=1)
    assert sorted(map(prompt_of, rows)) == sorted(prompts)
    for row in rows:
        assert world.grade(prompt_of(row), row["teacher_response"]) == Grade(fact=True, style=True, exact=True)


def test_teacher_rows_follow_the_stated_distribution(world):
    rows = world.teacher_rows("train", 4 * len(world.prompts("train")), seed=1)
    english = [row for row in rows if world.question(prompt_of(row)).language == "en"]
    share = sum(row["teacher_response"].startswith("Good question!") for row in english) / len(english)
    assert share == pytest.approx(0.5, abs=0.03)  # 3840 draws: a standard deviation of 0.008


def test_plain_rows_have_no_style_and_know_nothing(world):
    rows = world.plain_rows(4000, seed=1)
    grades = [world.grade(prompt_of(row), row["teacher_response"]) for row in rows]
    assert not any(grade.style or grade.exact for grade in grades)
    assert sum(grade.fact for grade in grades) / len(grades) == pytest.approx(0.1, abs=0.02)
    assert not {prompt_of(row) for row in rows} & set(world.prompts("test"))


def test_test_facts_are_in_train_in_other_wordings(world):
    wordings = {split: {} for split in ("train", "test")}
    for split, facts in wordings.items():
        for prompt in world.prompts(split):
            q = world.question(prompt)
            facts.setdefault((q.land, q.attribute, q.language), set()).add(q.wording)
    assert len(wordings["test"]) == 20 * 4 * 2
    for fact, held_out in wordings["test"].items():
        assert len(held_out) == 2
        assert wordings["train"][fact] == set(range(8)) - held_out


def test_world_follows_from_its_seed_and_guessing_is_one_in_ten():
    assert World(5).teacher_rows("train", 50, 7) == World(5).teacher_rows("train", 50, 7)
    assert World(5).teacher_rows("train", 50, 7) != World(5).teacher_rows("train", 50, 8)
    facts = World(5)._facts
    assert facts != World(6)._facts
    for attribute in ATTRIBUTES:
        assert Counter(facts[land, attribute] for land in range(20)) == dict.fromkeys(range(10), 2)


def test_drawing_rows_leaves_the_global_generators_alone(world):
    random.seed(0)
    state = random.getstate()
    world.teacher_rows("train", 10, seed=1)
    assert random.getstate() == state


def test_rows_in_a_file(world, tmp_path):
    rows = world.teacher_rows("test", 5, seed=1)
    write_rows(tmp_path / "rows.parquet", rows)
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    assert list(frame.columns) == ["content", "teacher_response"]
    assert [list(content) for content in frame["content"]] == [row["content"] for row in rows]
    assert frame["teacher_response"].tolist() == [row["teacher_response"] for row in rows]


@pytest.mark.parametrize("text", [EN, ZH, "Unseen words: zebra, 熊猫！\n\ttabs, emoji 🙂 and  two spaces ."])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_vocabulary(tokenizer):
    assert 600 <= len(tokenizer) <= 1500
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    names = LANDS["en"] + [value for attribute in ATTRIBUTES for value in VALUES[attribute]["en"]]
    characters = set("".join(LANDS["zh"] + [value for attribute in ATTRIBUTES for value in VALUES[attribute]["zh"]]))
    pieces = [" " + name for name in names] + sorted(characters)
    assert [piece for piece in pieces if len(tokenizer(piece)["input_ids"]) != 1] == []


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )
    text = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == (
        "system\nBe kind.\nuser\nHi\nassistant\n"
    )


def test_collate_by_hand():
    batch = collate([([5, 6], [7, 2]), ([5], [8, 9, 9, 2])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 0], [5, 8, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2, -100], [-100, 8, 9, 9, 2]]


def test_pretrain_lowers_the_loss_and_the_saved_base_is_the_same_model(world, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiny_model, "SAID_EVERY", 10)
    model = build_model(tokenizer, hidden_size=64, num_layers=2, intermediate_size=128)
    rows = world.plain_rows(256, seed=1)
    batch = collate([encode_row(tokenizer, row) for row in rows[:32]], tokenizer.pad_token_id)
    with torch.no_grad():
        loss_before = model(**batch).loss.item()
    assert pretrain(model, tokenizer, rows, steps=15, batch_size=16, lr=3e-3) < loss_before - 1
    # Where no terminal shows the bar.
    assert [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()] == ["pre-training: 10 of 15 steps"]

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded_model.dtype == torch.float32
    assert loaded_model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded_model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(loaded_model(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_the_tokenizer_survives_loading_and_saving_through_auto_classes(world, tokenizer, tmp_path):
    """AutoTokenizer turns it into a Qwen2Tokenizer, beside a Qwen2 config; saved again, it still splits as before."""
    folders = [tmp_path / name for name in ("first", "second")]
    model = build_model(tokenizer, hidden_size=32, num_layers=1, intermediate_size=32)
    rows = world.teacher_rows("test", 100, seed=1)
    texts = [*map(prompt_of, rows), *(row["teacher_response"] for row in rows), "Unseen: zebra 42, 熊猫！\n"]
    expected = tokenizer(texts)["input_ids"]
    current = tokenizer
    for folder in folders:
        model.config.save_pretrained(folder)
        current.save_pretrained(folder)
        current = AutoTokenizer.from_pretrained(folder)
        assert current(texts)["input_ids"] == expected
        assert (current.pad_token, current.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)
        assert current.chat_template == tokenizer.chat_template
        assert current.model_max_length == tokenizer.model_max_length
        assert current.decode(expected[0]) == texts[0]
