"""Files as their tools make them, converted, and read as training reads them."""

import json

import pyarrow.parquet as pq

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config
from verl.data_tools.convert import main
from verl.utils.dataset.rl_dataset import RLHFDataset


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(path, *flags, out="out.parquet"):
    """The rows that the trainer's own reader takes of what is converted; it ends in an error if one is not sound."""
    target = path.parent / out
    assert main([str(path), "--out", str(target), "--overwrite", *flags]) == 0
    trained = RLHFDataset(target, byte_tokenizer(), make_config(max_prompt_length=4096, max_response_length=4096))
    if target.suffix == ".jsonl":
        rows = [json.loads(line) for line in target.open(encoding="utf-8")]
    else:
        rows = pq.read_table(target).to_pylist()
    assert [row["teacher_text"] for row in trained] == [row["teacher_response"] for row in rows]
    return rows


def pairs(rows):
    """Each row as its messages, (role, text), and its answer."""
    return [([(m["role"], m["content"]) for m in row["content"]], row["teacher_response"]) for row in rows]


def asked(prompt, answer):
    """What `pairs` has for one question."""
    return ([("user", prompt)], answer)


def refused(path, capsys, *flags):
    """The sentence with which it is refused; nothing is written."""
    target = path.parent / "refused.parquet"
    assert main([str(path), "--out", str(target), *flags]) == 2
    assert not target.exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error
