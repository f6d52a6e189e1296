"""Every format as it is published, and what becomes of each row of it."""

import json

import pytest

from tests.data_tools.dt_files import asked, converted, pairs, refused, write_json, write_lines
from verl.data_tools.convert import main

HUMAN, GPT = {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " 你好\n"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "再见"},
]


# ---- conversations


def test_sharegpt_has_a_row_for_each_answer(tmp_path, capsys):
    rows = [
        {"id": "a", "conversations": [HUMAN, GPT, {"from": "human", "value": "+1?"}, {"from": "gpt", "value": "3"}]},
        {"id": "b", "conversations": [{"from": "system", "value": "Brief."}, {"from": "user", "value": "x"},
                                      {"from": "chatgpt", "value": "y"}]},
        {"id": "c", "system": "Be kind.", "conversations": [HUMAN, GPT]},
        {"id": "d", "system": "", "conversations": [HUMAN, GPT, HUMAN]},
        {"id": "e", "conversations": [GPT, HUMAN, GPT]},
        {"id": "f", "conversations": [HUMAN, {"from": "narrator", "value": "Later"}, GPT]},
    ]  # fmt: skip
    path = write_json(tmp_path / "data.json", rows)
    got = converted(path)
    assert pairs(got) == [
        asked("1+1?", "2"),
        ([("user", "1+1?"), ("assistant", "2"), ("user", "+1?")], "3"),
        ([("system", "Brief."), ("user", "x")], "y"),
        ([("system", "Be kind."), ("user", "1+1?")], "2"),
        asked("1+1?", "2"),
        # The conversation began in the middle: its first answer is to nothing, the second has its question.
        ([("assistant", "2"), ("user", "1+1?")], "2"),
    ]
    assert [row["id"] for row in got] == ["a", "a", "b", "c", "d", "e"]
    assert [row["turn"] for row in got] == [0, 1, 0, 0, 0, 1]
    assert [row["conversation"].rpartition(":")[2] for row in got] == ["0", "0", "1", "2", "3", "4"]
    report = capsys.readouterr().out
    assert "data.json: JSON list, 6 rows, recognised as sharegpt (column 'conversations')" in report
    assert "6 rows to train on, one for each answer of a conversation" in report and "carried along: id\n" in report
    assert "left out 3 (rows and answers are counted from 0):" in report
    assert "1 x it ends in a question without an answer; first in row 3, answer 1" in report
    assert "1 x it begins with an answer that nobody asked for; first in row 4, answer 0" in report
    assert "1 x a message has the role 'narrator'; first in row 5, answer 0" in report

    last = converted(path, "--turns", "last", "--drop_columns")
    assert [row["teacher_response"] for row in last] == ["3", "y", "2", "2", "2"]
    assert set(last[0]) == {"content", "teacher_response"}


def test_two_different_system_messages_are_no_conversation(tmp_path, capsys):
    row = {"system": "Be kind.", "conversations": [{"from": "system", "value": "Brief."}, HUMAN, GPT]}
    same = row | {"system": "Brief."}
    got = converted(write_lines(tmp_path / "data.jsonl", [row, same]))
    assert pairs(got) == [([("system", "Brief."), ("user", "1+1?")], "2")]
    assert "it has two system messages, in 'system' and in the conversation; first in row 0" in capsys.readouterr().out


def test_messages_of_openai(tmp_path, capsys):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    picture = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    rows = [
        {"messages": CHAT},
        {"messages": [{"role": "developer", "content": "Brief."}, {"role": "user", "content": parts}, CHAT[1]]},
        {"messages": [{"role": "user", "content": picture}, CHAT[1]]},
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1, "name": "bob"}]},
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "hm"}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
        {"messages": CHAT[:1]},
    ]
    path = write_lines(tmp_path / "data.jsonl", rows)
    got = converted(path, out="out.jsonl")
    first, second = (
        asked("hi", " 你好\n"),
        ([("user", "hi"), ("assistant", " 你好\n"), ("user", "bye")], "再见"),
    )
    developer = ([("system", "Brief."), ("user", "a\nb")], " 你好\n")
    # Not a space of a text is touched.
    assert pairs(got) == [first, second, developer, second, first]
    report = capsys.readouterr().out
    for reason in (
        "a message has a part of the type 'image_url', which is not text; first in row 2, answer 0",
        "the answer is marked as not to be learnt from (weight or train); first in row 3, answer 0",
        "a message's content is not text but null; first in row 5, answer 0",
        "the answer in 'messages' is empty; first in row 6, answer 0",
        "there is no answer in it; first in row 7, answer 0",
    ):
        assert f"1 x {reason}" in report
    assert "not kept: 'name' of messages, in 1 rows" in report
    assert "not kept: the reasoning of answers (--reasoning think puts it before them), in 1 rows" in report
    assert converted(path, "--reasoning", "think")[4]["teacher_response"] == "<think>\nhm\n</think>\n\n 你好\n"


CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
}


def test_tools_are_left_out_or_written_as_text(tmp_path, capsys):
    defined = WITH_TOOLS | {"tools": [{"type": "function", "function": {"name": "now"}}]}
    sharegpt = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": '{"name": "now"}'},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    path = write_lines(tmp_path / "data.jsonl", [WITH_TOOLS, defined])
    assert pairs(converted(path)) == [asked("hi", "Hello.")]
    report = capsys.readouterr().out
    # Of the first row one answer, and with it what follows; the second may use them from the beginning.
    assert (
        "2 x it uses tools, which are not text (--tools text writes them as text); first in row 0, answer 1" in report
    )

    call = '<tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>'
    got = pairs(converted(path, "--tools", "text"))
    assert [answer for _, answer in got] == ["Hello.", call, "Noon."] * 2
    assert got[2][0][2:] == [("user", "time?"), ("assistant", call), ("tool", "12:00")]
    definition = '# Tools\n\n<tools>\n{"type": "function", "function": {"name": "now"}}\n</tools>'
    assert got[3][0] == [("system", definition), ("user", "hi")]
    rows = converted(write_lines(tmp_path / "share.jsonl", [{"conversations": sharegpt}]), "--tools", "text")
    assert [row["teacher_response"] for row in rows] == ['<tool_call>\n{"name": "now"}\n</tool_call>', "Noon."]


# ---- columns


def test_alpaca_with_input_system_and_history(tmp_path, capsys):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi.", "system": "Brief.", "history": [["Hey", "Yes?"]]},
        {"instruction": "Empty.", "input": None, "output": ""},
        {"instruction": "Null.", "input": "", "output": None},
        {"instruction": 7, "input": "", "output": "seven"},
        {"instruction": "", "input": "", "output": "what?"},
        {"instruction": "Bad.", "input": "", "output": "x", "history": [["only one"]]},
    ]
    got = converted(write_json(tmp_path / "data.json", rows))
    assert pairs(got) == [
        asked("Add.\n1 2", "3"),
        ([("system", "Brief."), ("user", "Hey")], "Yes?"),
        ([("system", "Brief."), ("user", "Hey"), ("assistant", "Yes?"), ("user", "Greet.")], "Hi."),
    ]
    report = capsys.readouterr().out
    assert "recognised as alpaca (prompt 'instruction', answer 'output')" in report and "left out 5" in report
    for reason in ("the answer in 'output' is empty; first in row 2", "'output' is null; first in row 3",
                   "'instruction' is not text but int; first in row 4", "the prompt is empty; first in row 5",
                   "'history' has something that is not a pair of texts; first in row 6"):  # fmt: skip
        assert f"1 x {reason}" in report
    dolly = {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"}
    assert pairs(converted(write_lines(tmp_path / "dolly.jsonl", [dolly]))) == [asked("Sum up.\nLong.", "Short.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"content": [{"role": "user", "content": "q"}], "teacher_response": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": "b"},
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"style": "rule", "ground_truth": "a"}},
        {"prompt": "q", "response": "a", "system_prompt": ""},
    ],
    ids=str,
)
def test_columns_of_prompts_and_answers(tmp_path, row):
    (got,) = converted(write_lines(tmp_path / "data.jsonl", [row]))
    assert pairs([got]) == [asked("q", "a")]
    assert got.get("rejected") == row.get("rejected")


def test_a_prompt_of_several_turns_is_one_row(tmp_path):
    # Only the answer column is the teacher's.
    row = {"content": CHAT[:3], "teacher_response": "再见"}
    (got,) = converted(write_lines(tmp_path / "data.jsonl", [row]))
    assert got == row


def test_a_text_that_is_json_stays_the_text(tmp_path):
    texts = ['[{"role": "assistant", "content": "inside"}]', '[{"a": 1}]', '{"role": "user"}', "[1]"]
    rows = [{"prompt": text, "response": text} for text in texts]
    assert pairs(converted(write_lines(tmp_path / "data.jsonl", rows))) == [asked(text, text) for text in texts]
    # A conversation can be nothing but messages.
    packed = [{"messages": json.dumps(CHAT)}, {"chosen": json.dumps(CHAT), "rejected": "b"}]
    for row, count in zip(packed, (2, 1), strict=True):
        assert len(converted(write_lines(tmp_path / "packed.jsonl", [row]))) == count


def test_columns_that_training_reads_with_the_prompt_are_looked_at(tmp_path, capsys):
    rows = [
        {"prompt": "one", "response": "a", "tools": "a hammer", "system": "S", "mine": "S"},
        {"prompt": "two", "response": "b", "tools": "[]", "system": "S", "mine": "T"},
        {"prompt": "three", "response": "c", "tools": None, "system": "S", "mine": "S"},
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(source), "--out", str(out), "--system_column", "mine"]) == 0
    assert [json.loads(line)["teacher_response"] for line in out.read_text().splitlines()] == ["c"]
    said = capsys.readouterr().out
    assert "1 x the column 'tools' is not JSON" in said and "are both the system message, and differ" in said
    assert main([str(source), "--out", str(out), "--system_column", "mine", "--drop_columns", "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 3


def test_columns_named_by_hand(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"answer": "2+2 is 4.\n#### 4", "index": 3},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "verl.parquet")
    (got,) = converted(tmp_path / "verl.parquet")
    assert got["teacher_response"] == "4"
    assert {name: got[name] for name in row if name != "prompt"} == {n: v for n, v in row.items() if n != "prompt"}
    assert "recognised as verl (prompt 'prompt', answer 'reward_model.ground_truth')" in capsys.readouterr().out
    (got,) = converted(tmp_path / "verl.parquet", "--answer_column", "extra_info.answer")
    assert got["teacher_response"] == "2+2 is 4.\n#### 4"

    odd = {"Frage": "q", "Antwort": "a", "Rolle": "Brief.", "content": "lost"}
    path = write_lines(tmp_path / "odd.jsonl", [odd])
    flags = ("--prompt_column", "Frage", "--answer_column", "Antwort", "--system_column", "Rolle")
    assert pairs(converted(path, *flags)) == [([("system", "Brief."), ("user", "q")], "a")]
    assert "not kept, because it is the name of a column that is written: 'content'" in capsys.readouterr().out
    assert "has nothing in a column 'Fragen', only 'Frage', 'Antwort', 'Rolle'" in refused(
        path, capsys, "--prompt_column", "Fragen", "--answer_column", "Antwort"
    )
    path = write_lines(tmp_path / "named.jsonl", [{"talk": CHAT}])
    assert len(converted(path, "--prompt_column", "talk")) == 2


# ---- what cannot be told


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": CHAT, "conversations": [HUMAN, GPT]},
         "(column 'conversations') and messages (column 'messages'); say which with --format sharegpt or messages"),
        ({"prompt": "q", "question": "q", "answer": "a"},
         "and prompt_response (prompt 'question', answer 'answer'); say which with --prompt_column"),
        ({"prompt": "q", "response": "a", "answer": "b"}, "say which with --answer_column"),
        ({"instruction": "i", "output": "o", "prompt": "p"}, "say which with --format alpaca or prompt_response"),
        ({"prompt": "q", "messages": CHAT, "chosen": "a", "rejected": "b"}, "say which with"),
    ],
)  # fmt: skip
def test_two_formats_that_fit_are_both_named(tmp_path, row, says, capsys):
    error = refused(write_lines(tmp_path / "data.jsonl", [row]), capsys)
    assert "data.jsonl, row 0: fits " in error and says in error


def test_the_flag_that_is_named_settles_it(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"messages": CHAT, "conversations": [HUMAN, GPT]}])
    assert len(converted(path, "--format", "messages")) == 2
    assert len(converted(path, "--format", "sharegpt")) == 1
    path = write_lines(tmp_path / "both.jsonl", [{"prompt": "q", "response": "a", "answer": "b"}])
    assert converted(path, "--answer_column", "answer")[0]["teacher_response"] == "b"


def test_rows_of_two_kinds_are_named_and_one_kind_can_be_had(tmp_path, capsys):
    rows = [{"conversations": [HUMAN, GPT]}] * 3 + [{"instruction": "i", "output": "o"}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    error = refused(path, capsys)
    assert "has rows of two kinds: row 0 fits sharegpt (column 'conversations'), row 3 fits alpaca" in error
    assert "--format sharegpt or alpaca" in error
    assert len(converted(path, "--format", "sharegpt")) == 3
    assert "1 x there is no 'conversations' in it; first in row 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "only text"}, "its columns 'text' are not those of any format"),
        ({"prompt": "q", "id": 1}, "there are prompts in 'prompt', but no answers"),
        ({"response": "a"}, "there are answers in 'response', but no prompts"),
        ({"messages": "hi"}, "'messages' has no list of messages with role and content, or from and value"),
        ({"messages": []}, "'messages' has no list of messages"),
        ({"conversations": [["human", "hi"]]}, "'conversations' has no list of messages"),
    ],
)
def test_an_unknown_format_says_what_is_missing(tmp_path, row, says, capsys):
    error = refused(write_lines(tmp_path / "data.jsonl", [row]), capsys)
    assert f"{tmp_path}/data.jsonl: its columns" in error and says in error and "--prompt_column" in error


def test_pictures_are_left_out_and_the_left_out_are_written(tmp_path, capsys):
    rows = [{"conversations": [HUMAN, GPT], "images": []}, {"conversations": [HUMAN, GPT], "images": ["a.png"]}]
    path = write_lines(tmp_path / "data.jsonl", [*rows, {"conversations": "gone"}])
    aside = tmp_path / "left.jsonl"
    assert len(converted(path, "--left_out", str(aside))) == 1
    left = [json.loads(line) for line in aside.open()]
    assert [(row["row"], row["answer"], row["reason"]) for row in left] == [
        (1, None, "it has more than text (column 'images')"),
        (2, None, "'conversations' is not a list of messages but text"),
    ]
    assert left[0]["record"] == rows[1] and left[0]["file"] == str(path)
    assert "wrote" in capsys.readouterr().out
    error = refused(path, capsys, "--on_bad_row", "error")
    assert (
        f"2 rows or answers cannot be converted (rows of a file are counted from 0):\n  {path}, row 1: it has" in error
    )


def test_nothing_is_written_where_no_row_is_left(tmp_path, capsys):
    error = refused(write_lines(tmp_path / "data.jsonl", [{"prompt": "q", "response": " "}]), capsys)
    assert "no row is left, so nothing is written" in error and "1 x the answer in 'response' is empty" in error


def test_outputs_are_neither_overwritten_nor_the_inputs(tmp_path, capsys):
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "q", "response": "a"}])
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    assert main([str(path), "--out", str(out)]) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "is there already; pass --overwrite" in error
    assert out.read_text() == "mine"
    new = str(tmp_path / "new.jsonl")
    for flags in ([str(path), "--overwrite"], [str(tmp_path / "out.csv")], [str(out / "out.jsonl")],
                  [new, "--format", "x"], [new, "--encoding", "base64"], [new, "--left_out", new]):  # fmt: skip
        assert main([str(path), "--out", *flags]) == 2
        assert "expected" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.jsonl", "out.parquet"]


def test_columns_of_several_types_are_json_text_in_parquet(tmp_path, capsys):
    rows = [
        {"prompt": "q", "response": "a", "n": 1, "empty": {}, "big": 2**70, "half": "\ud83d", "same": {"x": 1}},
        {"prompt": "q", "response": "a", "n": "one", "empty": {}, "big": None, "half": "", "same": {"y": [2]}},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = converted(path)
    assert [row["n"] for row in got] == ["1", "one"] and [row["empty"] for row in got] == ["{}", "{}"]
    assert got[0]["big"] == str(2**70) and got[1]["big"] is None and got[1]["same"] == {"x": None, "y": [2]}
    assert "parquet has no one type for their values: n, empty, big, half" in capsys.readouterr().out
    assert converted(path, out="out.jsonl")[0]["n"] == 1
