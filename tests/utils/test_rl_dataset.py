import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import models
from torch.utils.data import DataLoader

from tests.utils.word_rows import (
    ASSISTANT,
    EOS,
    HAO,
    MA,
    NI,
    ONE,
    PAD,
    SYSTEM,
    THREE,
    TWO,
    UNK,
    USER,
    WORDS,
    make_config,
    make_row,
    make_tokenizer,
    write_jsonl,
    write_parquet,
)
from verl.batch import CRITIC_PROMPT_KEYS, Prompts
from verl.utils.dataset import looks, rl_dataset, texts
from verl.utils.dataset.arrow_rows import FileRows
from verl.utils.dataset.cache import Cache
from verl.utils.dataset.looks import Looker
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.dataset.texts import Tokenization


def open_rows(tmp_path, rows, tokenizer=None, max_samples=-1, **changes):
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    return RLHFDataset(str(path), tokenizer or make_tokenizer(), make_config(**changes), max_samples=max_samples)


# ---- one row, by hand

PROMPT_IDS = [USER, ONE, TWO, ASSISTANT]
ANSWER_IDS = [NI, HAO, THREE, EOS]


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_a_row_by_hand(tmp_path, write, pad):
    fill = PAD if pad == "<pad>" else EOS
    path = write(tmp_path / f"data.{'parquet' if write is write_parquet else 'jsonl'}", [make_row()])
    row = RLHFDataset(path, make_tokenizer(pad=pad), make_config())[0]
    assert {key: value.tolist() for key, value in row.items() if isinstance(value, torch.Tensor)} == {
        "input_ids": [fill, fill, *PROMPT_IDS],
        "attention_mask": [0, 0, 1, 1, 1, 1],
        "position_ids": [0, 0, 0, 1, 2, 3],
        "teacher_response": [*ANSWER_IDS, fill],
        "teacher_input_ids": [fill, fill, *PROMPT_IDS, *ANSWER_IDS, fill],
        "teacher_attention_mask": [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        "teacher_position_ids": [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0],
    }
    assert {key: value for key, value in row.items() if not isinstance(value, torch.Tensor)} == {
        "raw_prompt_ids": PROMPT_IDS,
        "teacher_text": "你好 three",
        "index": 0,
        "uid": "0",
        "extra_info": {},
    }
    assert {value.dtype for value in row.values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_eos_and_pad_ids_inside_the_text_stay_unmasked(tmp_path):
    row = open_rows(tmp_path, [make_row("<eos> one", "<pad> two <eos>")], make_tokenizer(pad="<eos>"))[0]
    assert row["input_ids"].tolist() == [EOS, EOS, USER, EOS, ONE, ASSISTANT]
    assert row["attention_mask"].tolist() == [0, 0, 1, 1, 1, 1]
    # The text's own EOS at its end is the one that closes the answer.
    assert row["teacher_response"].tolist() == [PAD, TWO, EOS, EOS, EOS]
    assert row["teacher_attention_mask"].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("answer", ["one<eos>", "one <eos>\n", "one<eos> <eos>", "one"])
def test_an_answer_that_ends_in_the_eos_text_gets_no_second_one(tmp_path, answer):
    row = open_rows(tmp_path, [make_row(answer=answer)])[0]
    assert row["teacher_response"].tolist()[:2] == [ONE, EOS]
    assert row["teacher_attention_mask"][6:].tolist() == [1, 1, 0, 0, 0]
    assert row["teacher_text"] == "one", "what answers are compared with as text"


def test_an_eos_inside_an_answer_is_a_word_and_one_that_is_all_there_is_is_no_answer(tmp_path):
    row = open_rows(tmp_path, [make_row(answer="one<eos>two")])[0]
    assert row["teacher_response"].tolist()[:2] == [UNK, EOS]
    with pytest.raises(ValueError, match="makes no token of the answer"):
        open_rows(tmp_path, [make_row(answer="<eos>")])


@pytest.mark.parametrize(
    ("answer", "ids", "real"),
    [
        ("one", [ONE, EOS, PAD, PAD, PAD], 2),
        ("one two three 你", [ONE, TWO, THREE, NI, EOS], 5),  # EOS just fits
        ("one two three 你好", [ONE, TWO, THREE, NI, HAO], 5),  # all the text, and no room for EOS
        ("one two three 你好吗 one", [ONE, TWO, THREE, NI, HAO], 5),
    ],
)
def test_answer_is_cut_and_ends_with_eos_when_it_fits(tmp_path, answer, ids, real):
    row = open_rows(tmp_path, [make_row(answer=answer)])[0]
    assert row["teacher_response"].tolist() == ids
    assert row["teacher_attention_mask"][6:].tolist() == [1] * real + [0] * (5 - real)
    assert row["teacher_text"] == answer


def test_several_messages_template_arguments_and_raw_chat(tmp_path):
    content = [{"role": "system", "content": "three"}, {"role": "user", "content": "你好吗"}]
    rows = [{"content": content, "teacher_response": "one"}]
    dataset = open_rows(
        tmp_path, rows, max_prompt_length=8, return_raw_chat=True, apply_chat_template_kwargs={"think": "two"}
    )
    assert dataset[0]["raw_prompt_ids"] == [SYSTEM, THREE, USER, NI, HAO, MA, ASSISTANT, TWO]
    assert dataset[0]["raw_prompt"] == content


# ---- prompts that are too long

LONG = "one two three 你好吗"  # 6 tokens, 8 with <user> and <assistant>
LONG_IDS = [USER, ONE, TWO, THREE, NI, HAO, MA, ASSISTANT]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ("left", [THREE, NI, HAO, MA, ASSISTANT]),
        ("right", [USER, ONE, TWO, THREE, NI]),
        ("middle", [USER, ONE, HAO, MA, ASSISTANT]),
    ],
)
def test_truncation(tmp_path, truncation, kept):
    dataset = open_rows(tmp_path, [make_row(LONG), make_row("one")], truncation=truncation, max_prompt_length=5)
    row = dataset[0]
    assert row["input_ids"].tolist() == kept
    assert row["raw_prompt_ids"] == kept
    assert row["attention_mask"].tolist() == [1] * 5
    assert row["teacher_position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert dataset[1]["raw_prompt_ids"] == [USER, ONE, ASSISTANT]


def test_truncation_error_comes_at_construction_and_names_the_ways_out(tmp_path):
    rows = [make_row(), make_row(LONG), make_row(), make_row(LONG + " one")]
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, rows)
    message = str(error.value)
    assert "data.jsonl, row 1 (counted from 0) has 8 tokens, more than data.max_prompt_length=6" in message
    assert "2 of 4 prompts" in message
    for way_out in ("data.max_prompt_length=9 fits", "data.filter_overlong_prompts=True", "data.truncation=left"):
        assert way_out in message
    assert len(open_rows(tmp_path, rows, max_prompt_length=9)) == 4


def test_filter_overlong_prompts(tmp_path, caplog):
    first = write_jsonl(tmp_path / "a.jsonl", [make_row(LONG), make_row("one"), make_row(LONG)])
    second = write_parquet(tmp_path / "b.parquet", [make_row("two"), make_row("one two three 你")])
    with caplog.at_level(logging.INFO, logger=rl_dataset.__name__):
        dataset = RLHFDataset([first, second], make_tokenizer(), make_config(filter_overlong_prompts=True))
    # the last prompt has exactly the six tokens that are allowed
    assert [row["index"] for row in dataset] == [1, 3, 4]
    assert [row["uid"] for row in dataset] == ["1", "3", "4"]
    (record,) = [record for record in caplog.records if "filter_overlong_prompts" in record.message]
    assert record.levelno == logging.WARNING
    assert "dropped 2 of 5 rows" in record.message
    assert "data.max_prompt_length=6" in record.message
    assert f"({first} 2 of 3, {second} 0 of 2)" in record.message


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no row is left"):
        open_rows(tmp_path, [make_row(LONG)], filter_overlong_prompts=True)


def test_what_processes_see_is_what_one_sees(tmp_path, monkeypatch):
    rows = [make_row("one " * (i % 7 + 1), "<eos> two" if i == 4 else "one " * (i % 3)) for i in range(10)]
    file = FileRows(write_jsonl(tmp_path / "data.jsonl", rows), Cache(tmp_path / "cache"))
    looker = Looker(Tokenization(make_tokenizer(), {"think": "two"}), "content", "teacher_response", True)
    monkeypatch.setattr(looks, "ROWS_AT_ONCE", 3)
    alone = looks._look(file, 10, looker, None)
    assert alone.prompt_tokens.tolist() == [0 if i % 3 == 0 else i % 7 + 1 + 3 for i in range(10)]
    assert alone.answer_tokens.tolist() == [0, 2, 3, 0, 3, 3, 0, 2, 3, 0]
    assert alone.faults[3] == "the answer in 'teacher_response' is empty"
    assert alone.special.tolist() == [i == 4 for i in range(10)]
    monkeypatch.setattr(looks, "MIN_ROWS_PER_PROCESS", 4)  # 10 rows: enough for two of the three
    several = looks._look(file, 10, looker, 3)
    for name in ("faults", "prompt_tokens", "answer_tokens", "special", "stubborn", "open_thoughts"):
        assert getattr(several, name).tolist() == getattr(alone, name).tolist()


# ---- files


def test_several_files_and_max_samples(tmp_path):
    first = write_parquet(tmp_path / "a.parquet", [make_row("one"), make_row("two")])
    second = write_jsonl(tmp_path / "b.jsonl", [make_row("three"), make_row("你")])
    dataset = RLHFDataset([str(first), second], make_tokenizer(), make_config())
    assert [row["raw_prompt_ids"][1] for row in dataset] == [ONE, TWO, THREE, NI]
    assert [row["index"] for row in dataset] == [0, 1, 2, 3]
    few = RLHFDataset([first, second], make_tokenizer(), make_config(), max_samples=3)
    assert [row["raw_prompt_ids"][1] for row in few] == [ONE, TWO, THREE]


def test_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "home.jsonl", [make_row()])
    assert len(RLHFDataset("~/home.jsonl", make_tokenizer(), make_config())) == 1


def test_missing_files_are_all_listed(tmp_path):
    here = write_jsonl(tmp_path / "here.jsonl", [make_row()])
    with pytest.raises(FileNotFoundError) as error:
        RLHFDataset([tmp_path / "x.jsonl", here, tmp_path / "y.parquet"], make_tokenizer(), make_config())
    assert str(tmp_path / "x.jsonl") in str(error.value)
    assert str(tmp_path / "y.parquet") in str(error.value)
    assert "here.jsonl" not in str(error.value)


def test_unreadable_files(tmp_path):
    def open_file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return RLHFDataset(tmp_path / name, make_tokenizer(), make_config())

    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        open_file("empty.jsonl", "\n\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2 \(from 1\) is not JSON"):
        open_file("broken.jsonl", json.dumps(make_row()) + '\n{"content": \n')
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1 \(from 1\) is not a JSON object but list"):
        open_file("list.jsonl", "[1]\n")
    with pytest.raises(ValueError, match=r"empty\.parquet is not a readable parquet file"):
        open_file("empty.parquet", "")
    with pytest.raises(ValueError, match=r"table\.csv ends in none of \.parquet, \.jsonl"):
        open_file("table.csv", "content,teacher_response\n")
    with pytest.raises(ValueError, match="no data file"):
        RLHFDataset([], make_tokenizer(), make_config())
    no_rows = write_parquet(tmp_path / "no_rows.parquet", pd.DataFrame([make_row()]).iloc[:0])
    with pytest.raises(ValueError, match=r"no_rows\.parquet has no rows"):
        RLHFDataset(no_rows, make_tokenizer(), make_config())


def test_extra_info_from_both_kinds_of_file(tmp_path):
    rows = [make_row(extra_info={"source": "x"}), make_row(extra_info=None)]
    for path in (write_parquet(tmp_path / "a.parquet", rows), write_jsonl(tmp_path / "a.jsonl", rows)):
        dataset = RLHFDataset(path, make_tokenizer(), make_config())
        assert [row["extra_info"] for row in dataset] == [{"source": "x"}, {}]


# ---- bad rows

BAD_ROWS = [
    (make_row(answer=None), "the answer in 'teacher_response' is null"),
    (make_row(answer=""), "the answer in 'teacher_response' is empty"),
    (make_row(answer=" \n\u3000"), "the answer in 'teacher_response' is empty"),
    (make_row(answer=3), "the answer in 'teacher_response' is not text but int"),
    ({"content": make_row()["content"]}, "there is no column 'teacher_response', only 'content'"),
    ({"teacher_response": "one"}, "there is no column 'content', only 'teacher_response'"),
    (make_row() | {"content": "one two"}, "'content' is not a list of chat messages but str"),
    (make_row() | {"content": []}, "'content' has no chat messages"),
    (make_row() | {"content": ["one"]}, "a message of 'content' is not {role: text, content: text}: it is str"),
    (
        make_row() | {"content": [{"role": "user"}]},
        "a message of 'content' is not {role: text, content: text}: it has no content, only role",
    ),
    (make_row(prompt=None), "a message of 'content' is not {role: text, content: text}: its content is null"),
    (
        make_row(prompt=[{"type": "text"}]),
        "a message of 'content' is not {role: text, content: text}: its content is a list of parts, and text alone is "
        "read",
    ),
]


@pytest.mark.parametrize(("bad", "fault"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, bad, fault):
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, [make_row(), bad, make_row()])
    assert str(error.value).splitlines()[0] == "1 of 3 rows cannot be used (rows of a file are counted from 0):"
    assert str(error.value).splitlines()[1] == f"  {tmp_path / 'data.jsonl'}, row 1: {fault}"
    assert len(open_rows(tmp_path, [make_row(), bad, make_row()], on_bad_row="skip")) == 2


def test_the_first_ten_bad_rows_are_listed(tmp_path):
    rows = [make_row()] + [make_row(answer=None)] * 12
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, rows)
    assert re.findall(r"row (\d+)", str(error.value)) == [str(number) for number in range(1, 11)]
    assert "... and 2 more" in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)


def test_bad_rows_of_a_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [make_row(), make_row(answer=None), make_row("two")])
    with pytest.raises(ValueError, match=r"data\.parquet, row 1: the answer in 'teacher_response' is null"):
        RLHFDataset(path, make_tokenizer(), make_config())
    with pytest.raises(ValueError, match="there is no column 'prompt', only 'content', 'teacher_response'"):
        RLHFDataset(path, make_tokenizer(), make_config(prompt_key="prompt"))


def test_skipping_counts_each_reason_and_keeps_the_row_numbers(tmp_path, caplog):
    rows = [make_row(answer=None), make_row(), make_row(answer=""), make_row(answer=None), make_row("two")]
    with caplog.at_level(logging.WARNING, logger=rl_dataset.__name__):
        dataset = open_rows(tmp_path, rows, on_bad_row="skip")
    assert [(row["index"], row["uid"]) for row in dataset] == [(1, "1"), (4, "4")]
    (message,) = [record.message for record in caplog.records if "on_bad_row" in record.message]
    assert "left out 3 of 5 rows: 2 x the answer in 'teacher_response' is null; 1 x the answer" in message


# ---- answers that do not fit


def answer_report(tmp_path, caplog, answers, **changes):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=rl_dataset.__name__):
        open_rows(tmp_path, [make_row(answer=answer) for answer in answers], **changes)
    (record,) = [record for record in caplog.records if "teacher answers" in record.message]
    return record.levelno, record.message


def test_cut_answers_are_counted_once(tmp_path, caplog):
    # 2, 5 (just fits), 6 and 8 tokens with EOS; the 99th percentile of four numbers, rounded up, is the largest
    level, message = answer_report(tmp_path, caplog, ["one", "one " * 4, "one " * 5, "one " * 7])
    assert level == logging.WARNING
    assert "2 of 4 teacher answers do not fit data.max_response_length=5" in message
    assert "99th percentile is 8 tokens" in message
    assert "data.max_response_length=8 would keep 99% whole" in message


def test_percentile_suggestion_fits_99_percent(tmp_path, caplog):
    # lengths with EOS are 2..202: the 99th percentile of 201 values is the 199th, 200
    answers = ["one " * count for count in range(1, 202)]
    _, message = answer_report(tmp_path, caplog, answers)
    assert "197 of 201" in message
    assert "data.max_response_length=200 would" in message
    _, message = answer_report(tmp_path, caplog, answers, max_response_length=200)
    assert "2 of 201" in message
    assert "would keep" not in message


def test_texts_are_tokenised_in_slices(tmp_path, monkeypatch, caplog):
    """Slices of 20 characters at least, the last may have fewer; the lengths are those of all texts at once."""
    answers = ["one two three", "two three one", "one", "你好 one two three two", "one two"]
    rows = [make_row(prompt, answer) for prompt, answer in zip(["one"] * 4 + ["one two three"], answers, strict=True)]
    tokenizer, seen = make_tokenizer(), []
    monkeypatch.setattr(looks, "SLICE_CHARACTERS", 20)
    tokenise = texts.tokenize_answers

    def watch(tokenizer, texts, *rest):
        seen.append(list(texts))
        return tokenise(tokenizer, texts, *rest)

    monkeypatch.setattr(texts, "tokenize_answers", watch)
    with caplog.at_level(logging.INFO, logger=rl_dataset.__name__):
        open_rows(tmp_path, rows, tokenizer)
    assert seen == [answers[:2], answers[2:4], answers[4:]]
    # 4, 4, 2, 7 and 3 tokens with EOS.
    assert any("1 of 5 teacher answers do not fit" in r.message and "is 7 tokens" in r.message for r in caplog.records)


def test_no_cut_answers_are_no_warning(tmp_path, caplog):
    level, message = answer_report(tmp_path, caplog, ["one", "two"])
    assert level == logging.INFO
    assert "0 of 2" in message


# ---- tokenizers


def test_tokenizer_without_a_chat_template_or_eos(tmp_path):
    with pytest.raises(ValueError, match="has no chat template"):
        open_rows(tmp_path, [make_row()], make_tokenizer(template=None))
    with pytest.raises(ValueError, match="has no EOS token"):
        open_rows(tmp_path, [make_row()], make_tokenizer(eos=None))


def test_processors_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [make_row()])
    with pytest.raises(ValueError, match="only text"):
        RLHFDataset(path, make_tokenizer(), make_config(), processor=object())


# ---- batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_makes_batches(tmp_path, workers):
    dataset = open_rows(tmp_path, [make_row("one"), make_row("two"), make_row("one two")], return_raw_chat=True)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate_fn, num_workers=workers))
    assert [len(batch["uid"]) for batch in batches] == [2, 1]
    first = batches[0]
    assert first["input_ids"].shape == (2, 6)
    assert first["teacher_input_ids"].shape == (2, 11)
    # two lists of the same length stay two objects
    assert first["raw_prompt_ids"].shape == (2,)
    assert first["raw_prompt_ids"].tolist() == [[USER, ONE, ASSISTANT], [USER, TWO, ASSISTANT]]
    objects = {key for key, value in first.items() if isinstance(value, np.ndarray)}
    assert objects == {"raw_prompt_ids", "teacher_text", "index", "uid", "extra_info", "raw_prompt"}
    assert all(first[key].dtype == object and first[key].shape == (2,) for key in objects)


def test_a_batch_keeps_the_named_columns_that_rows_have(tmp_path):
    dataset = open_rows(tmp_path, [make_row("one"), make_row("two")])
    batch = collate_fn([dataset[0], dataset[1]], columns=("input_ids", "index", "raw_prompt"))
    assert set(batch) == {"input_ids", "index"}
    assert batch["input_ids"].shape == (2, 6)
    assert batch["index"].tolist() == [0, 1]


def test_a_run_reads_columns_that_the_dataset_has(tmp_path):
    (row,) = open_rows(tmp_path, [make_row()], return_raw_chat=True)
    # What a discriminator with a tokenizer of its own reads is added by `OwnPrompts`.
    assert set(Prompts.names()) - set(CRITIC_PROMPT_KEYS) <= set(row)


def test_an_answer_without_a_token_is_refused(tmp_path):
    # A vocabulary without an unknown token drops what it does not know.
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model = models.BPE({word: i for i, word in enumerate(WORDS)}, merges=[])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(make_row(answer="你")) + "\n" + json.dumps(make_row(answer="xyz")) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: the tokenizer makes no token of the answer 'xyz'"):
        RLHFDataset(str(path), tokenizer, make_config())
