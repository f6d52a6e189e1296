"""Tokenizers that do not do what their files or the data ask for."""

import json
import logging
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config, make_row, write_jsonl
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.tokenizer_checks import check_ids, check_template_kwargs, dated_prompt


def saved(folder):
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def change_file(folder, **changes):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_ids_are_compared_with_the_file_on_the_data_too(tmp_path):
    tokenizer = saved(tmp_path)
    rows = [make_row("one"), make_row("two", "quizzical"), make_row("three")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = make_config(max_prompt_length=40, max_response_length=40)
    assert len(RLHFDataset(path, tokenizer, config)) == 3
    # A file that differs in one word, which the made-up texts do not have.
    change_file(tmp_path, normalizer={"type": "Replace", "pattern": {"String": "quizzical"}, "content": "q"})
    check_ids(tokenizer)
    with pytest.raises(ValueError, match=r"data\.jsonl, row 1, 'quizzical'\.\.\., it makes 9 tokens, not 1"):
        RLHFDataset(path, tokenizer, config)


def test_ids_are_compared_on_made_up_text(tmp_path):
    tokenizer = saved(tmp_path)
    check_ids(tokenizer)
    change_file(tmp_path, truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})
    check_ids(tokenizer)  # What transformers does not heed either.
    change_file(tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(ValueError, match=r"is not the one in its tokenizer\.json: of a text like any"):
        check_ids(tokenizer)


def test_a_token_that_another_file_adds_is_no_difference(tmp_path):
    tokenizer = saved(tmp_path)
    tokenizer.add_tokens(["quizzical"])
    check_ids(tokenizer, [("a quizzical text", "here")])


def test_tokenizers_without_a_file_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    change_file(tmp_path, normalizer={"type": "Lowercase"})
    check_ids(byte_tokenizer())


def with_template(template: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_arguments_that_the_template_does_not_know():
    tokenizer = with_template("{% if enable_thinking is defined %}x{% endif %}{{ messages[0].content }}")
    check_template_kwargs(tokenizer, {"enable_thinking": False, "tools": [], "continue_final_message": False})
    with pytest.raises(ValueError, match=r"enable_thinkin: .* no such variable.*did you mean enable_thinking\?"):
        check_template_kwargs(tokenizer, {"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"apply_chat_template_kwargs\.tokenize is set by the trainer itself"):
        check_template_kwargs(tokenizer, {"tokenize": False})
    # Of several templates it is the one that is used.
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ style }}"}
    check_template_kwargs(tokenizer, {"chat_template": "tool_use", "style": 1})
    with pytest.raises(ValueError, match=r"apply_chat_template_kwargs\.style"):
        check_template_kwargs(tokenizer, {"style": 1})


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }} {{ messages[0].content }}"
)


def test_a_template_that_prints_the_date_is_named(tmp_path, caplog):
    messages = make_row()["content"]
    today = datetime.now().strftime("%d %b %Y")
    assert dated_prompt(with_template(DATED), {}, messages) == today
    assert dated_prompt(with_template(DATED), {"date_string": "26 Jul 2024"}, messages) is None
    assert dated_prompt(with_template("{{ strftime_now(form) }}{{ messages[0].content }}"), {"form": "%Y"}, messages)
    assert dated_prompt(byte_tokenizer(), {}, messages) is None
    path = write_jsonl(tmp_path / "data.jsonl", [make_row()])
    config = make_config(max_prompt_length=60, max_response_length=40)
    with caplog.at_level(logging.WARNING):
        RLHFDataset(path, with_template(DATED), config)
    (message,) = [record.message for record in caplog.records if "strftime_now" in record.message]
    assert f"{today!r} in that of {path}, row 0" in message
    caplog.clear()
    config.apply_chat_template_kwargs = {"date_string": "26 Jul 2024"}
    RLHFDataset(path, with_template(DATED), config)
    assert not [record for record in caplog.records if "strftime_now" in record.message]
