"""Files that are damaged, in another encoding or too large to be read at once: which row it is, and what is left."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config
from verl.utils.dataset import arrow_rows
from verl.utils.dataset.rl_dataset import RLHFDataset, find_files, read_rows

GOOD = {"content": [{"role": "user", "content": "hi"}], "teacher_response": "yes"}


def line(record=GOOD) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def open_file(path, on_bad_row="error"):
    return RLHFDataset(path, byte_tokenizer(), make_config(max_prompt_length=64, on_bad_row=on_bad_row))


CHINESE = GOOD | {"teacher_response": "你好"}
BAD_LINES = {
    "gbk": (json.dumps(CHINESE, ensure_ascii=False).encode("gbk"), r"is not UTF-8 \(byte 0xc4\): save the file as"),
    "latin-1": (b'{"teacher_response": "caf\xe9"}', r"is not UTF-8 \(byte 0xe9\)"),
    "half of a character": (line(CHINESE).replace("好".encode(), "好".encode()[:2]), r"is not UTF-8 \(byte 0xe5\)"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply to be read"),
    "not JSON": (b'{"content": ', "is not JSON: Expecting value"),
    "a number too long": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "a list": (b"[1]", "is not a JSON object but list"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_read_is_named_or_left_out(tmp_path, name, caplog):
    bad, fault = BAD_LINES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(line() + b"\n" + bad.rstrip(b"\n") + b"\n" + line())
    # The third line of the file, counted from 1, as the second is blank.
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3 \(from 1\) {fault}"):
        open_file(path)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3 \(from 1\) {fault}"):
        read_rows([path])
    with caplog.at_level(logging.WARNING):
        dataset = open_file(path, "skip")
    assert [row["index"] for row in dataset] == [0, 2]
    assert any("left out 1 of 3 rows: 1 x not readable; the first is" in r.message for r in caplog.records)


def test_a_whole_file_in_another_encoding_is_named(tmp_path):
    for encoding in ("gb18030", "utf-16"):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_bytes((line(CHINESE) * 3).decode().encode(encoding))
        with pytest.raises(ValueError, match=rf"{encoding}\.jsonl, line 1 \(from 1\) is not UTF-8"):
            open_file(path)
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(CHINESE))
    assert open_file(path)[0]["teacher_text"] == "你好"


def text_column(texts: list[bytes]) -> pa.Array:
    """A column of text whose bytes nobody has looked at."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, type=pa.binary()).buffers())


def test_a_parquet_row_in_another_encoding_is_named_or_left_out(tmp_path):
    answers = text_column([b"yes", "你好".encode("gbk"), "好".encode(), b"\xed\xa0\xbd"])
    table = pa.table({"content": [GOOD["content"]] * 4, "teacher_response": answers})
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError) as error:
        open_file(tmp_path / "data.parquet")
    assert f"{tmp_path}/data.parquet, row 1: its text is not UTF-8 (byte 0xc4)" in str(error.value)
    assert f"{tmp_path}/data.parquet, row 3: its text is not UTF-8 (byte 0xed)" in str(error.value)
    dataset = open_file(tmp_path / "data.parquet", "skip")
    assert [(row["index"], row["teacher_text"]) for row in dataset] == [(0, "yes"), (2, "好")]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (pa.array([0, 2**40], pa.timestamp("s")), "date value out of range"),
        (pa.array([0, 10**7], pa.date32()), "date value out of range"),
        (pa.array([None, 0], pa.timestamp("us", tz="Mars/Base")), "zoneinfo"),
    ],
)
def test_a_value_that_python_cannot_have_is_named_or_left_out(tmp_path, values, says):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD]).append_column("when", values), path)
    with pytest.raises(ValueError, match=f"d.parquet, row 1: one of its columns .*{says}"):
        open_file(path)
    assert [row["index"] for row in open_file(path, "skip")] == [0]


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"content": [GOOD["content"]], "teacher_response": ["yes"]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.parquet").write_bytes(whole[:20] + b"\xff" * 40 + whole[60:])
    for name in ("cut", "page"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet is not a readable parquet file"):
            open_file(tmp_path / f"{name}.parquet")


class TooLarge:
    """A file whose batches are refused above a number of rows, as pyarrow does above 2 GiB; the limit may fall on the
    way."""

    def __init__(self, limits: dict[int, int]):
        self.table = pa.table({"number": list(range(30))})
        self.limits = limits
        self.asked = []

    def iter_batches(self, size, row_groups):
        assert row_groups == [0]
        self.asked.append(size)
        for start in range(0, 30, size):
            if size > self.limits[start // 10]:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield self.table.slice(start, size).to_batches()[0]


def test_batches_that_are_too_large_are_read_in_smaller_ones(monkeypatch):
    monkeypatch.setattr(arrow_rows, "ROWS_PER_BATCH", 16)
    # 16 rows at once are too many; then 2, from row 20 on; a row stands alone in the end. None is lost or repeated.
    file = TooLarge({0: 10, 1: 2, 2: 1})
    batches = arrow_rows._read_row_group(file, 0)
    assert [number for batch in batches for number in batch["number"].to_pylist()] == list(range(30))
    assert file.asked == [16, 2, 1]
    with pytest.raises(pa.ArrowNotImplementedError):
        list(arrow_rows._read_row_group(TooLarge({0: 0, 1: 0, 2: 0}), 0))


def test_row_groups_and_batches_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "ROWS_PER_BATCH", 3)
    pq.write_table(pa.table({"number": list(range(20))}), tmp_path / "data.parquet", row_group_size=7)
    read = read_rows(find_files(tmp_path / "data.parquet"))
    assert [(row.number, row.record["number"]) for row in read] == [(n, n) for n in range(20)]
