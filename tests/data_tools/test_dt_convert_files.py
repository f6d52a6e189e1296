"""Every kind of file as its tool writes it, and damaged ones of each."""

import csv
import datetime
import gzip
import io
import json
import sys
import zipfile
from pathlib import Path

import datasets
import openpyxl
import pandas as pd
import pytest

from tests.data_tools.dt_files import asked, converted, pairs, refused, write_json, write_lines
from verl.data_tools.convert import main

ROWS = [{"prompt": '你好, "Welt"\nzwei', "response": "好；答"}, {"prompt": "007", "response": "a\tb"}]
EXPECTED = [asked(row["prompt"], row["response"]) for row in ROWS]


def csv_text(rows=ROWS, **dialect):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **({"dialect": "excel"} | dialect))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---- JSON


def test_every_shape_of_json(tmp_path):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    table = pd.DataFrame(ROWS)
    texts = {
        "list.json": json.dumps(ROWS, indent=2),
        "lists.json": json.dumps(columns),
        "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
        "pandas.json": table.to_json(),
        "index.json": table.to_json(orient="index"),
        "records.jsonl": table.to_json(orient="records", lines=True),
        "lines.json": "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS),
        "list.jsonl": json.dumps(ROWS),
        # The ends of lines that are none in JSON lines.
        "raw.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert pairs(converted(tmp_path / name)) == EXPECTED, name
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_json(tmp_path / "one.json", {"messages": talk})
    assert pairs(converted(path)) == [asked("q", "a")]
    path = write_json(tmp_path / "bare.json", [talk])
    assert pairs(converted(path)) == [asked("q", "a")]


def test_packed_text(tmp_path, capsys):
    whole = gzip.compress(write_lines(tmp_path / "data.jsonl", ROWS).read_bytes())
    for name, text in (("data.jsonl.gz", whole), ("data.csv.gz", gzip.compress(csv_text().encode()))):
        (tmp_path / name).write_bytes(text)
        assert pairs(converted(tmp_path / name)) == EXPECTED
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz is not a whole gzip file" in refused(tmp_path / "cut.jsonl.gz", capsys)


GOOD = '{"prompt": "q", "response": "a"}'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("cut.json", f'[{GOOD}, {{"prompt": "q", "resp', "cut.json, row 1: is not JSON: Unterminated string"),
        ("cut.json", f"[{GOOD}, {GOOD}", "cut.json, after row 1: is not JSON: the file ends: is it cut?"),
        ("cut.json", f"[{GOOD},", "cut.json, row 1: is not JSON: Expecting value"),
        ("comma.json", f"[{GOOD} {GOOD}]", "after row 0: is not JSON: expected a comma or the list's end, got '{'"),
        ("comma.json", f"[{GOOD},]", "comma.json, row 1: is not JSON: "),
        ("two.json", f"[{GOOD}]\n[{GOOD}]", "goes on after the end of its list (line 2): are these two files in one?"),
        ("object.json", '{"prompt": ["q"], "respo', "object.json is not JSON: Unterminated string"),
        ("uneven.json", '{"prompt": ["q", "r"], "response": ["a"]}', "not equally long ('prompt' 2, 'response' 1)"),
        ("rows.json", '{"prompt": {"0": "q", "1": "r"}, "response": {"0": "a"}}', "of which 'response' has other rows"),
        ("number.json", "7", "is not a list of JSON objects, nor an object of lists, but int"),
        ("deep.json", "[" * 100_000, "deep.json, row 0: is not JSON: it is nested too deeply"),
        ("empty.json", " \n", "empty.json has no rows"),
        ("none.json", "[]", "none.json has no rows"),
        ("numbers.json", "[1, 2]", "numbers.json, row 0: is not a JSON object but int; no row of it can be read"),
        ("data.csv", "", "data.csv has no rows"),
        ("data.csv", "prompt,response\n", "data.csv has no rows"),
        ("open.csv", 'prompt,response\nq,a\n"q,a\nr,b\n',
         "open.csv, row 1, which begins in line 3 (from 1): is not CSV: a quote that opens there is not closed"),
        ("quote.csv", 'prompt,response\n"q"x,a\n', "quote.csv, row 0, which begins in line 2 (from 1): is not CSV: "),
        ("twice.csv", "prompt,prompt\nq,a\n", "twice.csv has two columns of the name 'prompt'"),
        ("header.csv", "was ist,das ist\nwas,das\n", "its columns 'was ist', 'das ist' are not those of any format"),
        ("data.txt.gz", "x", "is not a whole gzip file"),
        ("data.xlsx", "no zip", "data.xlsx is not a readable Excel file"),
        ("data.xls", "old", "expected a file that ends in"),
        ("data.parquet", "PAR1", "data.parquet is not a readable parquet file"),
        ("data.docx", "x", "expected a file that ends in .json, .jsonl"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, text, says, capsys):
    (tmp_path / name).write_text(text)
    assert says in refused(tmp_path / name, capsys)


def test_damaged_lines_are_left_out_with_their_numbers(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(f'{GOOD}\n\n{{"prompt": \n[1]\n{GOOD[:-2]}\n{GOOD}\n')
    assert len(converted(tmp_path / "data.jsonl")) == 2
    report = capsys.readouterr().out
    assert "1 x is not JSON: Expecting value; first in row 1 (line 3 of the file, from 1)" in report
    assert "1 x is not a JSON object but list; first in row 2 (line 4 of the file, from 1)" in report
    assert "is not JSON: Unterminated string starting at; first in row 3 (line 5" in report
    error = refused(tmp_path / "data.jsonl", capsys, "--on_bad_row", "error")
    assert f"{tmp_path}/data.jsonl, row 1 (line 3 of the file, from 1): is not JSON" in error


def test_rows_of_wrong_types_are_left_out_with_reasons(tmp_path, capsys):
    rows = [*ROWS, {"prompt": 1, "response": "a"}, {"prompt": "q", "response": ["a"]}, {"prompt": "q"},
            {"prompt": "q", "response": "\ud83d"}, {"prompt": {"a": 1}, "response": "a"}]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pairs(converted(path)) == EXPECTED
    report = capsys.readouterr().out
    for reason in ("'prompt' is neither text nor a list of messages but int; first in row 2",
                   "a message is not an object but str; first in row 3",
                   "there is no 'response' in it; first in row 4",
                   "has half of a surrogate pair, U+D83D, which is not a character; first in row 5",
                   "'prompt' is neither text nor a list of messages but dict; first in row 6"):  # fmt: skip
        assert reason in report


# ---- CSV


@pytest.mark.parametrize(
    ("encoding", "dialect"),
    [
        ("utf-8", {}),
        ("utf-8-sig", {}),  # Excel: "CSV UTF-8"
        ("utf-16", {"dialect": "excel-tab"}),  # Excel: "Unicode text"
        ("utf-8", {"delimiter": ";"}),  # Excel where the comma is the decimal point
        ("utf-8", {"dialect": "unix"}),
        ("utf-8", {"lineterminator": "\r"}),  # Excel on old Macs
    ],
)
def test_csv_as_it_is_written(tmp_path, encoding, dialect):
    path = tmp_path / "data.csv"
    path.write_bytes(csv_text(**dialect).encode(encoding))
    # Quoted line ends, commas and quotes, and zeros before a number, stay as they are.
    assert pairs(converted(path)) == EXPECTED
    crlf = [{"prompt": "a\r\nb", "response": "c"}]
    path.write_bytes(csv_text(crlf, **dialect).encode(encoding))
    assert pairs(converted(path)) == [asked("a\r\nb", "c")]


def test_csv_of_excel_says_its_delimiter_and_pandas_its_index(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("sep=|\r\n" + csv_text(delimiter="|"), encoding="utf-8")
    assert pairs(converted(path)) == EXPECTED
    pd.DataFrame(ROWS).to_csv(path)
    assert converted(path)[0].keys() == {"content", "teacher_response"}
    path.write_text("prompt;response\na,b,c,d;e\n")
    assert pairs(converted(path, "--delimiter", ";")) == [asked("a,b,c,d", "e")]


def test_names_of_columns_as_people_write_them(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text("Question,ANSWER,Source\nq,a,s\n")
    (got,) = converted(path)
    assert pairs([got]) == [asked("q", "a")] and got["Source"] == "s"
    report = capsys.readouterr().out
    assert "the column 'Question' is read as 'question'" in report and "prompt 'question', answer 'answer'" in report
    assert pairs(converted(path, "--prompt_column", "Source", "--answer_column", "ANSWER")) == [asked("s", "a")]
    path.write_text("问题,回答\n你好,好\n", encoding="utf-8-sig")
    assert pairs(converted(path)) == [asked("你好", "好")]
    # Two that would be one column stay two.
    path.write_text("Prompt,PROMPT,response\nq,r,a\n")
    assert "its columns 'Prompt', 'PROMPT', 'response' are not those of any format" in refused(path, capsys)


def test_csv_of_another_encoding_is_asked_for(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_bytes(csv_text().encode("gb18030"))
    error = refused(path, capsys)
    assert f"{path} is not utf-8 text (line 2, byte 0xc4); it reads as gb18030 (" in error
    assert """('你好, ""Welt""')""" in error and "pass --encoding gb18030" in error
    assert pairs(converted(path, "--encoding", "gb18030")) == EXPECTED
    # Of others the reader sees which one it is.
    for encoding, text in (("cp1252", "Größe – où?"), ("big5", "謝謝您的關心"), ("shift_jis", "今日は良い天気ですね")):
        path.write_bytes(csv_text([{"prompt": text, "response": "a"}]).encode(encoding))
        start = text[2:] if encoding == "cp1252" else text
        error = refused(path, capsys)
        assert f"{encoding} ('{start}" in error and "gb18030" not in error
        assert pairs(converted(path, "--encoding", encoding)) == [asked(text, "a")]
    path.write_bytes(csv_text().encode("utf-16-le"))
    assert "it reads as utf-16-le ('你好, \"" in refused(path, capsys)
    assert pairs(converted(path, "--encoding", "utf-16-le")) == EXPECTED
    path.write_bytes(b"prompt,response\nq,\xff\xfe\x81\x00\xff\n")
    assert "is not utf-8 text (line 2, byte 0xff); " in refused(path, capsys)
    assert "is not gb18030 text" in refused(path, capsys, "--encoding", "gb18030")


def test_csv_rows_of_another_width_are_left_out(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text('prompt,response\nq,a\n\n"two\nlines",b\nq,a,extra\nq\nq,c\n')
    assert [row["teacher_response"] for row in converted(path)] == ["a", "b", "c"]
    report = capsys.readouterr().out
    assert "1 x has 3 fields, but the header 2; first in row 2 (line 6 of the file, from 1)" in report
    assert "1 x has 1 fields, but the header 2; first in row 3 (line 7 of the file, from 1)" in report


def test_conversations_in_csv_are_json_and_not_python(tmp_path, capsys):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "data.csv"
    path.write_text(csv_text([{"conversations": json.dumps(talk)}]))
    assert pairs(converted(path)) == [asked("q", "a")]
    path.write_text(csv_text([{"conversations": str(talk)}]))
    assert "'conversations' has no list of messages" in refused(path, capsys)
    question = json.dumps([{"role": "user", "content": "q"}])
    path.write_text(csv_text([{"prompt": question, "reward_model": json.dumps({"ground_truth": "a"})}]))
    assert pairs(converted(path)) == [asked("q", "a")]
    # A text that happens to be JSON is the text.
    path.write_text(csv_text([{"prompt": "[1, 2]", "response": '{"a": 1}'}]))
    assert pairs(converted(path)) == [asked("[1, 2]", '{"a": 1}')]


# ---- Excel


def test_excel_keeps_what_was_typed(tmp_path):
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["prompt", "response", "note"])
    typed = [
        (42, "42", None), (0.1 + 0.2, "0.3", None), ("007", "007", None), (True, "TRUE", None), (0.5, "50%", "0%"),
        (0.125, "12.5%", "0.0%"), (3.5, "3.50", "0.00"), (1234567, "1234567", "#,##0"), (-1.5, "-1.5", None),
        (datetime.datetime(2024, 5, 1), "2024-05-01", None), (1234567890123456, "1234567890123456", None),
    ]  # fmt: skip
    for row, (value, _, number_format) in enumerate(typed, start=2):
        sheet.append([f"你好\n{row}", value, row])
        if number_format:
            sheet.cell(row, 2).number_format = number_format
    book.create_sheet("empty")
    book.save(tmp_path / "data.xlsx")
    got = converted(tmp_path / "data.xlsx")
    assert [row["teacher_response"] for row in got] == [text for _, text, _ in typed]
    assert got[0]["content"][0]["content"] == "你好\n2" and got[0]["note"] == "2"


def test_excel_from_pandas_and_its_sheets(tmp_path, capsys):
    path = tmp_path / "data.xlsx"
    pd.DataFrame(ROWS).to_excel(path, index=False)
    assert pairs(converted(path)) == EXPECTED
    with pd.ExcelWriter(path) as writer:
        pd.DataFrame(ROWS).to_excel(writer, sheet_name="Train")
        pd.DataFrame(ROWS[:1]).to_excel(writer, sheet_name="Test", index=False)
    assert "expected one sheet with rows, got 'Train', 'Test'; name one with --sheet" in refused(path, capsys)
    assert "expected rows in a sheet 'Tst', got the sheets 'Train', 'Test'" in refused(path, capsys, "--sheet", "Tst")
    assert pairs(converted(path, "--sheet", "Train")) == EXPECTED
    assert len(converted(path, "--sheet", "Test")) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "data.xlsx is not a readable Excel file" in refused(path, capsys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no workbook")
    assert "data.xlsx is not a readable Excel file" in refused(path, capsys)


def test_excel_files_that_say_a_wrong_size(tmp_path):
    pd.DataFrame(ROWS).to_excel(tmp_path / "whole.xlsx", index=False)
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "data.xlsx", "w") as wrong:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("sheet1.xml"):
                assert b'ref="A1:B3"' in content
                content = content.replace(b'ref="A1:B3"', b'ref="A1"')
            wrong.writestr(name, content)
    assert pairs(converted(tmp_path / "data.xlsx")) == EXPECTED


def test_excel_cells_without_a_text(tmp_path, capsys):
    book = openpyxl.Workbook()
    for row in (["prompt", "response"], ["q", "a"], ["q", None], [], ["q", "=1+1"], ["q", "#N/A"], ["q", "a", "b"]):
        book.active.append(row)
    book.active["B6"].data_type = "e"
    book.save(tmp_path / "data.xlsx")
    assert pairs(converted(tmp_path / "data.xlsx")) == [asked("q", "a")]
    report = capsys.readouterr().out
    assert "1 x 'response' is null; first in row 1" in report
    assert "1 x has a formula in 'response' without its value: open and save it in Excel; first in row 2" in report
    assert "1 x has an Excel error in a cell (#N/A); first in row 3" in report
    assert "1 x has 3 fields, but the header 2; first in row 4 (line 7 of the file, from 1)" in report


# ---- folders and datasets


def test_a_saved_dataset(tmp_path, capsys):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = datasets.Dataset.from_list([{"messages": talk, "n": number} for number in range(4)])
    rows.select([3, 1]).save_to_disk(tmp_path / "one")
    got = converted(tmp_path / "one")
    assert [row["n"] for row in got] == [3, 1] and pairs(got)[0] == asked("q", "a")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(converted(tmp_path / "two")) == 4
    report = capsys.readouterr().out
    assert "Hugging Face folder, split 'train', 4 rows" in report and "its other splits are not read: test" in report
    assert len(converted(tmp_path / "two", "--split", "test")) == 1
    assert "expected a split 'val', got train, test" in refused(tmp_path / "two", capsys, "--split", "val")
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert f"{arrow} is not a readable Arrow stream: " in refused(tmp_path / "one", capsys)
    arrow.unlink()
    assert "expected the files that state.json names, got no " in refused(tmp_path / "one", capsys)


def test_pictures_in_a_dataset_are_not_even_decoded(tmp_path, capsys):
    rows = {"prompt": ["q", "r"], "response": ["a", "b"], "image": [None, {"bytes": b"no picture", "path": None}]}
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "response": datasets.Value("string"),
            "image": datasets.Image(decode=False),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    assert pairs(converted(tmp_path / "data", "--drop_columns")) == [asked("q", "a")]
    assert "it has more than text (column 'image'); first in row 1" in capsys.readouterr().out
    # Whatever the column is called.
    datasets.load_from_disk(tmp_path / "data").rename_column("image", "photo").save_to_disk(tmp_path / "renamed")
    assert pairs(converted(tmp_path / "renamed")) == [asked("q", "a")]
    assert "it has more than text (column 'photo'); first in row 1" in capsys.readouterr().out


def test_a_folder_of_data_files(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    write_lines(folder / "a.jsonl", ROWS)
    (folder / "more" / "b.csv").write_text(csv_text(), encoding="utf-8")
    (folder / "README.md").write_text("no data")
    assert pairs(converted(folder)) == EXPECTED * 2
    write_lines(folder / "test-0.jsonl", ROWS[:1])
    (folder / "a.jsonl").rename(folder / "train-0.jsonl")
    assert pairs(converted(folder)) == EXPECTED
    assert "the files of the split 'train'; 2 others are not read (test)" in capsys.readouterr().out
    assert pairs(converted(folder, "--split", "test")) == EXPECTED[:1]
    assert "has no files of a split 'dev', only of test, train" in refused(folder, capsys, "--split", "dev")
    (tmp_path / "none").mkdir()
    assert "none has no data files" in refused(tmp_path / "none", capsys)


def test_the_hub_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["nobody/no-such-dataset", "--out", str(tmp_path / "out.parquet")]) == 2
    error = capsys.readouterr().err
    assert (
        "nobody/no-such-dataset cannot be read as a dataset: it is no file here" in error and "HF_HUB_OFFLINE" in error
    )
    assert main([str(tmp_path / "gone.jsonl"), "--out", str(tmp_path / "out.parquet")]) == 2
    assert "no such file or folder, nor a dataset's name on the hub" in capsys.readouterr().err


def test_several_files_become_one(tmp_path, capsys):
    share = write_json(
        tmp_path / "a.json", [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    )
    table = tmp_path / "b.csv"
    table.write_text(csv_text(), encoding="utf-8")
    assert main([str(share), str(table), "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    assert pairs(rows) == [asked("q", "a"), *EXPECTED]
    report = capsys.readouterr().out
    assert "recognised as sharegpt" in report and "CSV with ',', 2 rows, recognised as prompt_response" in report


@pytest.mark.parametrize(("package", "name"), [("openpyxl", "data.xlsx"), ("datasets", "squad")])
def test_without_the_extra_it_is_named(tmp_path, monkeypatch, capsys, package, name):
    book = openpyxl.Workbook()
    book.save(tmp_path / "data.xlsx")
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(tmp_path / name if "." in name else Path(name), capsys)
    assert package in error and "pip install -e '.[data]'" in error
