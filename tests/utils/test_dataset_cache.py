"""Large files are mapped, and what was seen of rows is kept: never to be believed when it is not of these rows."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from tests.utils.word_rows import ONE, TEMPLATE, make_config, make_row, make_tokenizer, write_jsonl, write_parquet
from verl.utils.dataset import arrow_rows, cache, faults, looks
from verl.utils.dataset.arrow_rows import FileRows
from verl.utils.dataset.cache import HEAD, Cache
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, find_files, open_files

ROWS = [
    make_row("one", "two", extra_info={"a": 1}, other=[1.5, None]),
    make_row("你好", "three <eos> two"),
    make_row("one <user> two", "one", extra_info={"b": {"c": "d"}}),
    make_row("three", "one two three one two three"),
]
BAD = [make_row(), make_row(answer=None), make_row("one two three 你好吗"), make_row(answer=" ")]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(arrow_rows, "MAPPED_BYTES", 0)
    monkeypatch.setattr(looks, "CACHED_ROWS", 1)


@pytest.fixture
def no_look(monkeypatch):
    """From when it is called, rows that are looked at are an error."""

    def refuse(*_):
        raise AssertionError("a row was looked at")

    return lambda: monkeypatch.setattr(faults, "render_prompt", refuse)


def start(tmp_path, path, tokenizer=None, special="text", max_samples=-1, **changes):
    return RLHFDataset(
        path, tokenizer or make_tokenizer(), make_config(**changes), max_samples=max_samples,
        special_token_text=special, cache_dir=tmp_path / "cache",
    )  # fmt: skip


def content(dataset):
    rows = [dataset[number] for number in range(len(dataset))]
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]


def kept(tmp_path, kind):
    return sorted(path for path in (tmp_path / "cache").glob(f"{kind}-*") if path.suffix not in (".lock", ".part"))


def write(tmp_path, kind, rows=ROWS):
    return (write_jsonl if kind == "jsonl" else write_parquet)(tmp_path / f"data.{kind}", rows)


KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@KINDS
def test_mapped_rows_are_those_of_memory_and_a_next_start_looks_at_none(tmp_path, monkeypatch, kind, caplog, no_look):
    path = write(tmp_path, kind)
    with monkeypatch.context() as patch:
        patch.setattr(arrow_rows, "MAPPED_BYTES", 1 << 30)
        patch.setattr(looks, "CACHED_ROWS", 1 << 30)
        with caplog.at_level(logging.INFO):
            in_memory = content(start(tmp_path, path))
        said = [record.message for record in caplog.records]
        assert not (tmp_path / "cache").exists()
    if kind == "jsonl":
        # A parquet file has given all rows the same fields.
        assert [row["extra_info"] for row in in_memory] == [{"a": 1}, {}, {"b": {"c": "d"}}, {}]
    first = start(tmp_path, path)
    assert content(first) == in_memory
    assert len(kept(tmp_path, "rows")) == len(kept(tmp_path, "looks")) == 1
    no_look()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = start(tmp_path, path)
    assert content(again) == in_memory
    assert [record.message for record in caplog.records] == said
    # Batches of other processes, and rows that travel there.
    batches = DataLoader(again, batch_size=4, collate_fn=collate_fn, num_workers=1)
    assert next(iter(batches))["uid"].tolist() == ["0", "1", "2", "3"]
    travelled = pickle.loads(pickle.dumps(again.rows))
    assert [row.record for row in travelled] == [row.record for row in first.rows]
    assert len(pickle.dumps(FileRows(path, Cache(tmp_path / "cache")))) < 2000


@KINDS
def test_bad_rows_are_the_same_from_the_cache(tmp_path, kind, no_look, caplog):
    path, found = write(tmp_path, kind, BAD), []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            start(tmp_path, path)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            few = start(tmp_path, path, on_bad_row="skip", filter_overlong_prompts=True)
        found.append([str(error.value), content(few), [record.message for record in caplog.records]])
        no_look()
    assert found[0] == found[1]
    assert f"{path}, row 1: the answer in 'teacher_response' is null" in found[0][0]
    assert f"{path}, row 3: the answer in 'teacher_response' is empty" in found[0][0]
    assert [row["index"] for row in found[0][1]] == [0]
    assert any("dropped 1 of 2 rows, whose prompts" in message for message in found[0][2])


DAMAGE = {
    "a bit": lambda data: data[: HEAD + 40] + bytes([data[HEAD + 40] ^ 1]) + data[HEAD + 41 :],
    "the digest": lambda data: data.replace(data[20:24], b"0000"),
    "half": lambda data: data[: len(data) // 2],
    "nothing left": lambda data: b"",
    "more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "another version": lambda data: data.replace(b"verl cache 2", b"verl cache 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("what", ["rows", "looks"])
def test_what_is_damaged_is_made_anew(tmp_path, what, damage, caplog):
    path = write(tmp_path, "jsonl")
    expected = content(start(tmp_path, path))
    (file,) = kept(tmp_path, what)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    with caplog.at_level(logging.WARNING):
        assert content(start(tmp_path, path)) == expected
    assert [record.message for record in caplog.records if "is damaged: it is made anew" in record.message]
    assert file.read_bytes() == whole


def test_a_file_under_another_ones_key_is_not_believed(tmp_path):
    for name in ("one", "other"):
        assert Cache(tmp_path).file(name, lambda part, name=name: part.open("ab").write(name.encode()), "a name")
    (tmp_path / "one").write_bytes((tmp_path / "other").read_bytes())
    found = Cache(tmp_path).file("one", lambda part: part.open("ab").write(b"again"), "a name")
    assert found.read_bytes()[HEAD:] == b"again"


def test_what_another_process_writes_at_this_moment_is_left_to_it(tmp_path):
    young, old = tmp_path / "one.1.part", tmp_path / "one.2.part"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    assert Cache(tmp_path).file("one", lambda part: part.open("ab").write(b"x"), "a name")
    assert young.exists() and not old.exists()


def test_other_rows_and_other_readings_are_other_keys(tmp_path):
    path = write(tmp_path, "jsonl")
    start(tmp_path, path)
    before = path.stat()
    path.write_text(path.read_text().replace('"one"', '"six"', 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert content(start(tmp_path, path))[0]["raw_prompt_ids"][1] != ONE
    assert len(kept(tmp_path, "rows")) == 2
    readings = [
        {"special": "token"},
        {"max_samples": 2},
        {"truncation": "left"},
        {"apply_chat_template_kwargs": {"think": "one"}},
        {"tokenizer": make_tokenizer(template=TEMPLATE.replace("messages", "messages[:1]"))},
        {"response_key": "other_response", "on_bad_row": "skip"},
    ]
    for number, reading in enumerate(readings, start=3):
        try:
            start(tmp_path, path, **reading)
        except ValueError as error:
            assert "no row is left" in str(error)
        assert len(kept(tmp_path, "looks")) == number, reading
    # Whatever only decides what becomes of what was seen is none, and neither is where the file lies.
    path.rename(tmp_path / "moved.jsonl")
    start(tmp_path, tmp_path / "moved.jsonl", max_prompt_length=5, max_response_length=2, on_bad_row="skip")
    assert len(kept(tmp_path, "rows")) == 2
    assert len(kept(tmp_path, "looks")) == 2 + len(readings)


@pytest.mark.parametrize("what", ["the code", "pyarrow"])
def test_rows_of_another_reader_are_another_key(tmp_path, monkeypatch, what):
    """A line that was read wrongly once is not believed after the reader has been mended."""
    path = write(tmp_path, "jsonl")
    FileRows(path, Cache(tmp_path / "cache"))
    other = tmp_path / "arrow_rows.py"
    other.write_bytes(Path(arrow_rows.__file__).read_bytes() + b"# mended\n")
    if what == "the code":
        monkeypatch.setattr(arrow_rows, "__file__", str(other))
    else:
        monkeypatch.setattr(arrow_rows.pa, "__version__", "99.0.0")
    arrow_rows._reader.cache_clear()
    FileRows(path, Cache(tmp_path / "cache"))
    monkeypatch.undo()
    arrow_rows._reader.cache_clear()
    assert len(kept(tmp_path, "rows")) == 2


def test_what_depends_on_more_than_can_be_told_is_not_kept(tmp_path):
    path = write(tmp_path, "jsonl")
    start(tmp_path, path, make_tokenizer(template="{{ strftime_now('%Y') }}" + TEMPLATE), max_prompt_length=9)
    foreign = make_tokenizer()
    foreign.__class__ = type("Foreign", (type(foreign),), {"__module__": "somewhere"})
    start(tmp_path, path, foreign)
    assert kept(tmp_path, "looks") == []
    assert len(kept(tmp_path, "rows")) == 1


def test_a_folder_that_cannot_be_used_is_said_and_does_without(tmp_path, caplog):
    path = write(tmp_path, "jsonl")
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert len(start(tmp_path, path)) == len(ROWS)
    messages = [record.message for record in caplog.records if "cannot be kept in" in record.message]
    assert len(messages) == 2
    assert all("set data.cache_dir" in message for message in messages)


def test_a_folder_without_locks_to_get_serves_what_it_has(tmp_path, monkeypatch, caplog, no_look):
    """One that is read-only, or another user's."""
    path = write(tmp_path, "jsonl")
    expected = content(start(tmp_path, path))
    no_look()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.FileLock, "acquire", refused)
    with caplog.at_level(logging.WARNING):
        assert content(start(tmp_path, path)) == expected
    assert not [record for record in caplog.records if "cannot be kept" in record.message]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, caplog):
    path = write(tmp_path, "jsonl")
    replace = os.replace

    def full(source, target):
        if "cache" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert len(start(tmp_path, path)) == len(ROWS)
    assert any("No space left on device" in record.message for record in caplog.records)
    assert kept(tmp_path, "") == kept(tmp_path, "rows") == list((tmp_path / "cache").glob("*.part")) == []


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")
    read = arrow_rows._READERS[".jsonl"]

    def grows(path):
        yield from read(path)
        with path.open("a") as file:
            file.write(json.dumps(make_row()) + "\n")

    for size in (0, 1 << 30):
        monkeypatch.setattr(arrow_rows, "MAPPED_BYTES", size)
        monkeypatch.setitem(arrow_rows._READERS, ".jsonl", grows)
        with pytest.raises(ValueError, match=r"data\.jsonl changed while it was read"):
            start(tmp_path, path)
    assert kept(tmp_path, "rows") == []


ONE_OF_SEVERAL = """
import sys, time
from pathlib import Path
from tests.utils.word_rows import make_config, make_tokenizer
from verl.utils.dataset import arrow_rows, looks
from verl.utils.dataset.rl_dataset import RLHFDataset
arrow_rows.MAPPED_BYTES, looks.CACHED_ROWS, made = 0, 1, []
path, folder, at = sys.argv[1:]
read, look = arrow_rows._READERS[".jsonl"], looks.Looker.look
def slowly(path):
    made.append("rows")
    time.sleep(0.5)
    yield from read(path)
def looks_slowly(*arguments):
    made.append("looks")
    time.sleep(0.5)
    return look(*arguments)
arrow_rows._READERS[".jsonl"], looks.Looker.look = slowly, looks_slowly
Path(folder, at).touch()
while len(list(Path(folder).iterdir())) < 3:
    time.sleep(0.01)
dataset = RLHFDataset(path, make_tokenizer(), make_config(), cache_dir=folder + "/../cache")
print(made, [dataset[number]["raw_prompt_ids"] for number in range(len(dataset))])
"""


def test_processes_that_start_together_make_it_once(tmp_path):
    path = write(tmp_path, "jsonl", ROWS * 50)
    (tmp_path / "here").mkdir()
    (tmp_path / "cache").mkdir()
    # What a process that was killed has left.
    digest = FileRows(path, Cache(tmp_path / "other")).digest
    (left,) = [file.name for file in (tmp_path / "other").iterdir() if file.suffix != ".lock"]
    assert digest in left
    part = tmp_path / "cache" / f"{left}.0123abcd.part"
    part.write_bytes(b"half")
    os.utime(part, (0, 0))
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_SEVERAL, str(path), str(tmp_path / "here"), str(number)],
            stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
        )
        for number in range(3)
    ]  # fmt: skip
    printed = [process.communicate(timeout=600)[0].splitlines()[-1] for process in processes]
    made = sorted(line.partition("] ")[0] for line in printed)
    assert sum(line.count("rows") for line in made) == 1
    assert sum(line.count("looks") for line in made) == 1
    assert len({line.partition("] ")[2] for line in printed}) == 1
    assert list((tmp_path / "cache").glob("*.part")) == []


def test_lines_are_split_as_text_is(tmp_path):
    lines = [json.dumps(make_row(answer=f"a\u2028{n}\x85\x1c"), ensure_ascii=False) for n in range(5)]
    raw = f"\ufeff{lines[0]}\r\n\u3000 \n{lines[1]}\r\r{lines[2]}\n\n{lines[3]}\n{lines[4]}"
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw.encode())
    rows = open_files([path], Cache(tmp_path / "cache"))
    assert [(row.number, row.record["teacher_response"]) for row in rows] == [
        (n, f"a\u2028{n}\x85\x1c") for n in range(5)
    ]
    assert [number for batch in rows.files[0]._batches for number in batch["number"].to_pylist()] == [1, 3, 5, 7, 8]


def test_rows_are_chosen_across_files_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr("verl.utils.dataset.rows.ROWS_AT_ONCE", 4)
    frames = {"a": range(7), "b": range(7, 20)}
    for name, numbers in frames.items():
        frame = pd.DataFrame({"number": list(numbers), "kind": pd.Categorical([str(n % 3) for n in numbers])})
        frame.to_parquet(tmp_path / f"{name}.parquet", row_group_size=5)
    rows = open_files(find_files([tmp_path / "a.parquet", tmp_path / "b.parquet"]), Cache(tmp_path / "cache"))
    assert [row.record for row in rows] == [{"number": n, "kind": str(n % 3)} for n in range(20)]
    odd = rows[1::2]
    assert [(row.index, row.path.stem, row.number) for row in odd][2:5] == [(5, "a", 5), (7, "b", 0), (9, "b", 2)]
    assert [row.index for row in odd[::-1]] == [19, 17, 15, 13, 11, 9, 7, 5, 3, 1]
    assert odd[-1].index == 19
    assert dict(odd.by_file()) == {tmp_path / "a.parquet": 3, tmp_path / "b.parquet": 7}
    assert odd.counts() == [3, 7]
