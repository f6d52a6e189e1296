"""System messages and tools in columns of their own: written as they are, counted and checked as in training."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.tiny import byte_tokenizer, write_model
from verl.data_tools.check import main as check
from verl.data_tools.lengths.measure import measure
from verl.data_tools.rows import Columns
from verl.data_tools.writing import write_rows
from verl.utils.dataset.texts import Tokenization


def row(**more) -> dict:
    return {"content": [{"role": "user", "content": "hi"}], "teacher_response": "A whole answer.", **more}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tools_of_different_fields_stay_as_they_are(tmp_path):
    """As columns, every tool would get all fields, null where it has none."""
    tools = [[{"name": "a"}], [{"name": "b", "parameters": {"type": "object"}}], None]
    write_rows(tmp_path / "rows.parquet", [row(tools=each) for each in tools])
    read = pq.read_table(tmp_path / "rows.parquet")["tools"].to_pylist()
    assert [text and json.loads(text) for text in read] == tools
    write_rows(tmp_path / "alike.parquet", [row(tools=tools[0])] * 3)
    assert pq.read_table(tmp_path / "alike.parquet")["tools"].to_pylist() == [tools[0]] * 3


def test_a_system_column_is_part_of_the_prompt(tmp_path):
    """The tiny template: <role>, a byte each; 我 is three bytes."""
    file = write(tmp_path / "x.jsonl", row(), row(system="abc我"))
    plain, with_system = measure([file], Tokenization(byte_tokenizer()), Columns()).prompts
    assert with_system - plain == 1 + 3 + 3


@pytest.mark.parametrize("bad", [{"tools": "python"}, {"tools": 0}, {"system": 3}], ids=str)
def test_check_refuses_what_training_refuses(tmp_path, capsys, bad):
    model = write_model(tmp_path / "model")
    file = write(tmp_path / "x.jsonl", row(), row(**bad))
    assert check([str(file), "--model", str(model), "--fail_on", "bad"]) == 1
    assert f"the column '{next(iter(bad))}'" in capsys.readouterr().out
