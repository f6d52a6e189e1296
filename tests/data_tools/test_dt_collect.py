"""Collect against a teacher in a process of its own that fails in every way that servers do."""

import json
import re
import time
from collections import Counter
from functools import partial
from itertools import pairwise

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from tests.data_tools.teacher_server import answer_to
from tests.data_tools.teaching import (
    KEY,
    command,
    files_with_the_key,
    read_lines,
    rows_of,
    teaching,
    write_prompts,
)
from verl.data_tools.collect import main
from verl.data_tools.collect import run as run_module
from verl.tools.chat_client import ChatClient


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tries again after a hundredth of the seconds."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(run_module, "ChatClient", partial(ChatClient, backoff=0.01))


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert files_with_the_key(tmp_path) == []


def kinds(out):
    return json.loads((out.with_name(f"{out.stem}.collect") / "summary.json").read_text())["kinds"]


# ---- what comes out


def test_answers_become_rows_in_the_prompts_order(folder, capfd):
    prompts, out = write_prompts(folder / "p.txt", 12), folder / "data" / "t.parquet"
    with teaching(folder) as teacher:
        flags = ("--temperature", "0.5", "--top_p", "0.9", "--max_tokens", "64", "--seed", "5", "--n", "2",
                 "--extra_body", '{"thinking": {"type": "disabled"}, "top_p": null}', "--system_prompt", "Be brief.",
                 "--prices", "1", "10")  # fmt: skip
        assert main(command(prompts, out, teacher.url, *flags)) == 0
        (one, *_) = [line["body"] for line in teacher.lines("answered") if "number 3?" in line["text"]]
        assert {line["auth"] for line in teacher.lines("began")} == {f"Bearer {KEY}"}
        seeds = Counter(line["body"]["seed"] for line in teacher.lines("answered"))
    texts = [f"What is number {i}? 第{i}个问题" for i in range(12)]
    system = {"role": "system", "content": "Be brief."}
    assert one | {"seed": 5} == {
        "model": "teacher", "messages": [system, {"role": "user", "content": texts[3]}], "temperature": 0.5,
        "max_tokens": 64, "thinking": {"type": "disabled"}, "seed": 5,
    }  # fmt: skip
    assert seeds == {5: 12, 6: 12}
    rows = rows_of(out)
    assert [(row["content"][1]["content"], row["answer_number"]) for row in rows] == [
        (text, number) for number in (0, 1) for text in texts
    ]
    assert all(row["content"][0] == system for row in rows) and rows[0]["teacher_model"] == "teacher-2026"
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert [row["teacher_response"] for row in rows[:12]] == [answer_to(text) for text in texts]
    said = capfd.readouterr()
    # 24 answers of 10 and 20 tokens: 240 and 480; at 1 and 10 a million, 0.00504.
    assert (
        "24 of 24 wanted" in said.out and "240 of prompts, 480 of answers" in said.out and "0.01 in money" in said.out
    )
    # 64 tokens an answer at most: 24 * 64.
    assert "estimate: 24 answers, " in said.err and " + 1,536 tokens" in said.err
    assert KEY not in said.out + said.err


def test_each_kind_is_counted_and_kept_apart(folder, capsys):
    moods = {"number 0?": "length", "number 1?": "filter", "number 2?": "refuse", "number 3?": "拒绝",
             "number 4?": "refusal", "number 5?": "empty", "number 6?": "null", "number 7?": [400],
             "number 8?": [400, "content_filter"], "number 9?": "reason", "number 10?": "think",
             "number 11?": "surrogate", "number 12?": "no usage", "number 13?": "lines",
             "number 14?": "parts"}  # fmt: skip
    prompts, out = write_prompts(folder / "p.txt", 16), folder / "t.jsonl"
    with teaching(folder, by_text=moods) as teacher:
        run = partial(main, command(prompts, out, teacher.url))
        assert run() == 0
        expected = {"cut": 1, "refused": 5, "empty": 2, "failed": 1, "answered": 7}
        assert kinds(out) == expected and len(rows_of(out)) == 7
        said = capsys.readouterr().out
        assert "those of 1 answers by our count" in said and "2 answers came with their reasoning" in said
        apart = out.with_name("t.collect")
        assert {p.stem: len(read_lines(p)) for p in apart.glob("*.jsonl") if p.stem != "log"} == {
            kind: number for kind, number in expected.items() if kind != "answered"
        }
        assert read_lines(apart / "failed.jsonl")[0]["error"]["status"] == 400
        rows = {row["content"][0]["content"].split()[3]: row["teacher_response"] for row in rows_of(out)}
        assert rows["9?"] == answer_to("What is number 9? 第9个问题")
        assert rows["10?"].startswith("The answer") and rows["11?"].endswith(" �")
        assert rows["14?"] == answer_to("What is number 14? 第14个问题")
        assert rows["13?"] == "one\u2028two\x85three\r\n四\x00"

        # All of it is in the log: other choices ask nothing.
        asked = len(teacher.lines("began"))
        assert main(command(prompts, out, teacher.url, "--reasoning", "think", "--include", "cut", "refused")) == 0
        rows = {row["content"][0]["content"].split()[3]: row["teacher_response"] for row in rows_of(out)}
        assert rows["9?"].startswith("<think>\nLet me think. 让我想想。\n</think>\n\nThe answer")
        assert rows["10?"].startswith("<think>\nHm.\n</think>\n\nThe answer") and rows["0?"] == "The a"
        assert len(rows) == 7 + 1 + 4 + 0 and not (apart / "cut.jsonl").exists()
        assert len(teacher.lines("began")) == asked

        # What was refused for good is asked again when that is wanted, and only that.
        assert main(command(prompts, out, teacher.url, "--retry_failed")) == 0
        assert teacher.texts("began")[asked:] == ["What is number 7? 第7个问题"] and kinds(out) == expected


def test_all_kinds_of_files_are_read(folder, capsys):
    texts = ["one", "二", "three"]
    (folder / "a.txt").write_bytes("\ufeffone\r\n\n二\nthree\n".encode())
    (folder / "b.jsonl").write_text("".join(json.dumps({"question": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    chats = [[{"role": "user", "content": t}] for t in texts]
    (folder / "parquets" / "deep").mkdir(parents=True)
    for number, name in enumerate(("1.parquet", "deep/2.parquet")):
        part = slice(0, 2) if number == 0 else slice(2, 3)
        table = pa.table({"content": chats[part], "teacher_response": texts[part], "data_source": texts[part]})
        pq.write_table(table, folder / "parquets" / name)
    # As datasets.Dataset.save_to_disk writes it: Arrow streams, and the list of them.
    (folder / "saved").mkdir()
    table = pa.table({"prompt": texts})
    for number in range(2):
        part = table.slice(2 * number, 2)
        with pa.ipc.new_stream(str(folder / "saved" / f"data-0000{number}-of-00002.arrow"), part.schema) as stream:
            stream.write_table(part)
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    with teaching(folder) as teacher:
        for name in ("a.txt", "b.jsonl", "parquets", "saved"):
            out = folder / f"{name}.out.jsonl"
            assert main(command(folder / name, out, teacher.url)) == 0
            rows = rows_of(out)
            assert [row["content"] for row in rows] == chats
            assert [row["teacher_response"] for row in rows] == [answer_to(text) for text in texts]
            assert [row.get("id", i) for i, row in enumerate(rows)] == [0, 1, 2]
            assert ("data_source" in rows[0]) == (name == "parquets")
        # A prompt that comes again is asked once; two rows cannot be asked.
        lines = [{"prompt": "one"}, {"prompt": "one"}, {"prompt": None}, {"prompt": " "}, {"prompt": "four"}]
        (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
        arguments = command(folder / "c.jsonl", folder / "c.out.jsonl", teacher.url)
        before = len(teacher.texts())
        assert main(arguments) == 2 and "3 of 6 rows cannot be asked" in capsys.readouterr().err
        assert main([*arguments, "--on_bad_row", "skip"]) == 0 and len(teacher.texts()) == before + 2
        assert "rows left out: 1 repeat a prompt, 3 cannot be asked" in capsys.readouterr().out


# ---- failures on the way


def test_failures_that_pass_lose_nothing_and_ask_nothing_twice(folder, capsys):
    failures = [500, 503, 429, [429, "0.05"], "hang up", "half", "html", "error200", "sleep", "drip"]
    prompts, out = write_prompts(folder / "p.txt", 150), folder / "t.parquet"
    with teaching(folder, at_random=[0.25, 3, *failures]) as teacher:
        assert main(command(prompts, out, teacher.url, "--timeout", "0.5", "--retries", "12")) == 0
        answered = Counter(teacher.texts())
        moods = {str(line["mood"]) for line in teacher.lines("began")}
    assert moods == {"ok", *map(str, failures)}
    assert len(answered) == 150 and set(answered.values()) == {1}
    assert [row["content"][0]["content"] for row in rows_of(out)] == prompts.read_text().splitlines()
    assert "150 of 150 wanted" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_everybody(folder, form):
    """With two requests at once, the first refused for two seconds, none starts before these are over."""
    prompts, out = write_prompts(folder / "p.txt", 6), folder / "t.parquet"
    after = "2" if form == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4))
    with teaching(folder, moods=[[429, after]], delay=0.3) as teacher:
        assert main(command(prompts, out, teacher.url, "--concurrency", "2")) == 0
        began = [line["time"] for line in teacher.lines("began")]
    gap = max(later - earlier for earlier, later in pairwise(began))
    # A date has whole seconds, and starting the teacher took some of its four.
    assert gap > (1.6 if form == "seconds" else 0.8) and len(rows_of(out)) == 6


def test_requests_and_tokens_a_minute(folder):
    prompts, out = write_prompts(folder / "p.txt", 9), folder / "t.parquet"
    with teaching(folder) as teacher:
        assert main(command(prompts, out, teacher.url, "--requests_per_minute", "300")) == 0
        began = sorted(line["time"] for line in teacher.lines("began"))
        # Eight gaps of 0.2 s.
        assert 1.55 < began[-1] - began[0] < 5
        # Answers of 30 tokens, of which 1,200 a minute are 1.5 s for each; the first is expected to have 12 and 500.
        some = write_prompts(folder / "some.txt", 3)
        flags = ("--tokens_per_minute", "1200", "--answer_tokens", "20", "--concurrency", "1")
        assert main(command(some, folder / "u.parquet", teacher.url, *flags)) == 0
        began = sorted(line["time"] for line in teacher.lines("began"))[-3:]
        assert 2.7 < began[-1] - began[0] < 8


def test_what_gets_no_answer_is_left_for_the_next_run(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 20), folder / "t.parquet"
    flags = ("--retries", "1", "--concurrency", "2")
    with teaching(folder, by_text={"number 3?": 500, "number 7?": "html"}) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 1
        said = capsys.readouterr().out
        assert "18 of 20 wanted" in said and "2; 2 got none after all tries, the last: " in said
        assert "run the same command again" in said and len(rows_of(out)) == 18
    with teaching(folder) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 0
        assert sorted(teacher.texts()) == ["What is number 3? 第3个问题", "What is number 7? 第7个问题"]
    assert len(rows_of(out)) == 20


@pytest.mark.parametrize(
    ("mood", "most", "words"),
    [
        (401, 1, "got HTTP 401.*set OPENAI_API_KEY in the environment"),
        (403, 1, "got HTTP 403.*a key that may use the model"),
        (402, 1, "got HTTP 402.*no credit left"),
        ("no credit", 1, "got HTTP 429.*no credit left"),
        (404, 1, "got HTTP 404.*correct the URL"),
        (307, 1, "redirects are not followed; pass /elsewhere"),
        ([400], 8, "got refusals of 8 requests in a row, with HTTP 400"),
        ("html", 16, "got none to 8 requests in a row, each after 2 tries; the last: <html>busy</html>"),
        (500, 16, "got none to 8 requests in a row, each after 2 tries; the last: HTTP 500"),
    ],
)
def test_an_endpoint_that_cannot_be_used_ends_it(folder, capsys, mood, most, words):
    prompts, out = write_prompts(folder / "p.txt", 40), folder / "t.parquet"
    flags = ("--retries", "1", "--concurrency", "1")
    with teaching(folder, by_text={"number": mood}) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 2
        error = capsys.readouterr().err
        assert re.search(words, error) and KEY not in error and len(teacher.lines("began")) == most
    # Nothing was kept that would stand in the way of corrected settings.
    with teaching(folder) as teacher:
        assert main(command(prompts, out, teacher.url, "--max_tokens", "9")) == 0
    assert len(rows_of(out)) == 40


def test_refusals_in_a_row_are_the_prompts_fault_only_where_that_is_plain(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 60), folder / "t.jsonl"
    flags = ("--concurrency", "1")
    too_long = {f"number {number}?": [400, "context_length_exceeded"] for number in range(5, 45)}
    with teaching(folder, by_text=too_long) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 0
        assert kinds(out) == {"answered": 20, "failed": 40}
    capsys.readouterr()
    out = folder / "u.jsonl"
    with teaching(folder, by_text={f"number {number}?": [400] for number in range(5, 60)}) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 2
        assert "got refusals of 32 requests in a row" in capsys.readouterr().err and kinds(out) == {"answered": 5}
    with teaching(folder, by_text={f"number {number}?": [400] for number in range(50, 60)}) as teacher:
        assert main(command(prompts, out, teacher.url, *flags)) == 0
        assert kinds(out) == {"answered": 50, "failed": 10} and len(teacher.texts()) == 45


def test_nothing_there_and_a_wrong_key_are_said_before_anything_is_asked(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 3), folder / "t.parquet"
    assert main(command(prompts, out, "http://127.0.0.1:9/v1")) == 2
    assert "expected an OpenAI-compatible endpoint at http://127.0.0.1:9/v1, got" in capsys.readouterr().err
    with teaching(folder, key="Bearer another") as teacher:
        assert main(command(prompts, out, teacher.url)) == 2
        assert "set OPENAI_API_KEY in the environment" in capsys.readouterr().err and not teacher.lines("began")


@pytest.mark.parametrize("key", ["sk-secret\nnext-line-1234", "sk-密钥密钥密钥密钥密钥"])
def test_a_key_that_no_header_can_have_is_not_shown(folder, monkeypatch, capsys, key):
    monkeypatch.setenv("MY_KEY", key)
    with teaching(folder) as teacher:
        arguments = command(write_prompts(folder / "p.txt", 1), folder / "t.parquet", teacher.url)
        assert main([*arguments, "--api_key_env", "MY_KEY"]) == 2
    error = capsys.readouterr().err
    assert "error: MY_KEY: expected a key of letters" in error and key[:9] not in error


def test_a_word_that_is_no_key_is_left_in_answers(folder, monkeypatch):
    """Local servers are given keys such as this one."""
    monkeypatch.setenv("OPENAI_API_KEY", "answer")
    with teaching(folder) as teacher:
        assert main(command(write_prompts(folder / "answer.txt", 1), folder / "t.parquet", teacher.url)) == 0
    assert "The answer to" in rows_of(folder / "t.parquet")[0]["teacher_response"]


# ---- limits


def test_a_budget_is_not_exceeded_and_can_be_raised(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 30), folder / "t.parquet"
    with teaching(folder, delay=0.02) as teacher:
        # An answer costs 10 * 1 + 20 * 10 = 210 millionths, and 1,000 of 5,000 may be spent: with answers of at most
        # 20 tokens, 23 are asked for, as 24 would be 5,040.
        arguments = command(prompts, out, teacher.url, "--prices", "1", "10", "--max_tokens", "20")
        assert main([*arguments, "--budget", "0.005"]) == 0
        assert len(teacher.texts()) == 23 == len(rows_of(out))
        said, error = capsys.readouterr()
        assert "; --budget 0.005, of which 0.00 is spent, ends it before" in error
        assert "ended by --budget or --max_tokens_total" in said and "7 are left" in said
        assert main([*arguments, "--budget", "0.005"]) == 0 and len(teacher.texts()) == 23
        # 30 tokens an answer and about 14 expected of a prompt: 780 would be the 26th answer's.
        assert main([*arguments, "--max_tokens_total", "770"]) == 0 and len(teacher.texts()) == 25
        assert main(arguments) == 0 and len(teacher.texts()) == 30
    assert len(rows_of(out)) == 30


def test_a_dry_run_asks_and_writes_nothing(folder, capsys):
    prompts = write_prompts(folder / "p.txt", 1000)
    with teaching(folder) as teacher:
        flags = ("--dry_run", "--prices", "2", "10", "--answer_tokens", "300", "--max_tokens", "1000")
        assert main(command(prompts, folder / "t.parquet", teacher.url, *flags)) == 0
        assert not teacher.lines("began")
    # 300,000 and 1,000,000 tokens of answers are 3 and 10 in money; prompts of 14 or 15 tokens another 0.03.
    assert "estimate: 1,000 answers, 1" in (said := capsys.readouterr().out) and "+ 300,000 tokens" in said
    assert "3.03 in money, 10.03 at most" in said
    assert sorted(path.name for path in folder.iterdir()) == ["p.txt", "record_0"]


# ---- interruptions


def test_other_settings_are_refused_and_named(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 3), folder / "t.parquet"
    with teaching(folder) as teacher:
        assert main(command(prompts, out, teacher.url, "--temperature", "0.5")) == 0
        capsys.readouterr()
        assert main(command(prompts, out, teacher.url, "--max_tokens", "7")) == 2
        error = capsys.readouterr().err
        assert "temperature was 0.5, is not given; max_tokens was not given, is 7; name another --out" in error
        # More prompts and more answers to each are no other settings.
        write_prompts(prompts, 5)
        assert main(command(prompts, out, teacher.url, "--temperature", "0.5", "--n", "2")) == 0
        assert len(teacher.texts()) == 3 + 7 and len(rows_of(out)) == 10


def test_a_torn_line_and_a_damaged_one_are_asked_again(folder, capsys):
    prompts, out = write_prompts(folder / "p.txt", 6), folder / "t.parquet"
    log = folder / "t.collect" / "log.jsonl"
    with teaching(folder) as teacher:
        assert main(command(prompts, out, teacher.url, "--concurrency", "1")) == 0
        whole = log.read_bytes()
        lines = whole.splitlines(keepends=True)
        for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 1):
            log.write_bytes(whole[:-cut])
            before = len(teacher.texts())
            assert main(command(prompts, out, teacher.url)) == 0
            assert len(teacher.texts()) == before + 1 and len(log.read_bytes()) == len(whole)
        capsys.readouterr()
        log.write_bytes(b"".join([*lines[:2], b"\0" * 50 + b"\n", *lines[3:]]))
        before = len(teacher.texts())
        assert main(command(prompts, out, teacher.url)) == 0 and len(teacher.texts()) == before + 1
        assert "1 damaged lines" in capsys.readouterr().out
    assert len(rows_of(out)) == 6


# ---- the command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0", "--n", "2"], "--n: expected 1 with --temperature 0"),
        (["--budget", "1"], "--budget: expected --prices"),
        (
            ["--extra_body", '{"n": 3, "stream": true}'],
            "--extra_body: expected settings of one whole answer, got n, str",
        ),
        (["--endpoint", "127.0.0.1:8000/v1"], "--endpoint: expected a URL such as"),
        (["--endpoint", "https://me:word@host/v1"], "expected the key in the environment alone"),
        (["--endpoint", f"https://host/v1?key={KEY}"], "expected the key in the environment alone"),
        (["--out", "t.csv"], "--out: expected a file that ends in .parquet or .jsonl"),
        (["--system_prompt", "@nowhere"], "--system_prompt: expected a text file, got nowhere"),
        (["--prompt_key", "x"], "there is no column 'x', only 'prompt'"),
    ],
)
def test_bad_usage_is_a_sentence(folder, capsys, flags, words):
    arguments = command(write_prompts(folder / "p.txt", 2), folder / "t.parquet", "http://127.0.0.1:9/v1", *flags)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and KEY not in error


def test_a_foreign_file_is_not_replaced(folder, capsys):
    out = folder / "t.jsonl"
    out.write_text("mine\n")
    with teaching(folder) as teacher:
        arguments = command(write_prompts(folder / "p.txt", 2), out, teacher.url)
        assert main(arguments) == 2 and "is there already; pass --overwrite" in capsys.readouterr().err
        assert out.read_text() == "mine\n" and not teacher.lines("began")
        assert main([*arguments, "--overwrite"]) == 0 and len(rows_of(out)) == 2


def test_prompts_that_the_system_prompt_makes_alike_are_asked_once(folder):
    data, out = folder / "p.jsonl", folder / "t.jsonl"
    user, system = {"role": "user", "content": "one"}, {"role": "system", "content": "Be brief."}
    other = {"role": "system", "content": "Be long."}
    data.write_text("".join(json.dumps({"content": row}) + "\n" for row in ([user], [system, user], [other, user])))
    with teaching(folder) as teacher:
        assert main(command(data, out, teacher.url, "--system_prompt", "Be brief.")) == 0
        assert [line["body"]["messages"] for line in teacher.lines("answered")].count([system, user]) == 1
        assert main(command(data, out, teacher.url, "--system_prompt", "Be brief.", "--system_in_rows", "no")) == 0
    assert [row["content"] for row in rows_of(out)] == [[user], [other, user]]


def test_a_system_column_is_asked_with_and_tools_are_refused(folder, capsys):
    """Training puts both into the prompt, so a teacher who has not seen them answers another one."""
    data, out = folder / "p.jsonl", folder / "t.jsonl"
    rows = [{"prompt": "one", "system": "Be a cat."}, {"prompt": "one", "system": "Be a dog."}, {"prompt": "one"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    user = {"role": "user", "content": "one"}
    wanted = [[{"role": "system", "content": text}, user] for text in ("Be a cat.", "Be a dog.", "Be brief.")]
    with teaching(folder) as teacher:
        assert main(command(data, out, teacher.url, "--system_prompt", "Be brief.")) == 0
        asked = [line["body"]["messages"] for line in teacher.lines("answered")]
        assert sorted(asked, key=json.dumps) == sorted(wanted, key=json.dumps)
    assert [row["content"] for row in rows_of(out)] == wanted and not any("system" in row for row in rows_of(out))
    data.write_text(json.dumps({"prompt": "two", "tools": [{"name": "f"}]}) + "\n")
    assert main(command(data, folder / "u.jsonl", "http://127.0.0.1:9/v1")) == 2
    assert "the column 'tools' has tools" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(folder, capsys):
    prompts = folder / "p.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    assert main([*command(prompts, prompts, "http://127.0.0.1:9/v1"), "--overwrite"]) == 2
    assert "expected another file than those that are read" in capsys.readouterr().err


def test_columns_that_parquet_cannot_have_are_named_before_anything_is_asked(folder, capsys):
    data = folder / "p.jsonl"
    data.write_text('{"prompt": "one", "id": 1}\n{"prompt": "two", "id": "b"}\n')
    with teaching(folder) as teacher:
        assert main(command(data, folder / "t.parquet", teacher.url)) == 2
        assert "expected values of one type in column 'id'" in capsys.readouterr().err and not teacher.lines("began")
        assert main(command(data, folder / "t.jsonl", teacher.url)) == 0
    assert [row["id"] for row in rows_of(folder / "t.jsonl")] == [1, "b"]
