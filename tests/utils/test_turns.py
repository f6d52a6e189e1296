"""Assistant turns of whole conversations are rows as if each had been written into a file of its own."""

import json
import logging
import pickle
import tempfile
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.quickstart.tiny_model import CHAT_TEMPLATE
from tests.fuzz.fuzzing import refused_or, tries
from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config, write_jsonl
from verl.data_tools.convert import main as convert
from verl.utils.dataset import arrow_rows, faults, looks
from verl.utils.dataset import turns as turns_module
from verl.utils.dataset.arrow_rows import FileRows
from verl.utils.dataset.cache import Cache
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.rows import Rows
from verl.utils.dataset.sampler import EpochBatches
from verl.utils.dataset.turns import TurnRows

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
)
ADD = {"type": "function", "function": {"name": "add"}}


def talk(*pairs):
    """Messages of `u:text`, `a:text`, `s:text`, `t:text`."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": roles[pair[0]], "content": pair[2:]} for pair in pairs]


def answered(*pairs, **more):
    """A row as written by hand: the last of the pairs is the answer."""
    return {"content": talk(*pairs[:-1]), "teacher_response": pairs[-1][2:], **more}


CALL = {"role": "assistant", "content": "", "tool_calls": [ADD]}
CONVERSATIONS = [
    {"content": talk("u:How are you?", "a:Fine.", "u:And now?", "a:Still fine. ", "u:ok", "a: Bye"), "id": 7},
    {
        "content": talk("s:简短回答。", "u:苹果是什么颜色?", "a:红的", "u:香蕉呢?", "a:黄的<eos>"),
        "teacher_response": None,
    },
    {"content": talk("u:one", "a:two", "u:three"), "teacher_response": "four", "system": "Count."},
    {"content": [*talk("u:1+1?"), CALL, *talk("t:2", "a:It is 2.")], "tools": [ADD], "extra_info": {"a": 1}},
    {"content": talk("u:plain"), "teacher_response": "row"},
]
BY_HAND = [
    [
        answered("u:How are you?", "a:Fine.", id=7),
        answered("u:How are you?", "a:Fine.", "u:And now?", "a:Still fine. ", id=7),
        answered("u:How are you?", "a:Fine.", "u:And now?", "a:Still fine. ", "u:ok", "a: Bye", id=7),
    ],
    [
        answered("s:简短回答。", "u:苹果是什么颜色?", "a:红的"),
        answered("s:简短回答。", "u:苹果是什么颜色?", "a:红的", "u:香蕉呢?", "a:黄的<eos>"),
    ],
    [
        answered("u:one", "a:two", system="Count."),
        answered("u:one", "a:two", "u:three", "a:four", system="Count."),
    ],
    [
        {"content": [*talk("u:1+1?"), CALL, *talk("t:2")], "teacher_response": "It is 2.", "tools": [ADD],
         "extra_info": {"a": 1}},
    ],
    [answered("u:plain", "a:row")],
]  # fmt: skip


def start(path, turns="none", template=TOOLS, cache=None, max_samples=-1, **changes):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    settings = {"max_prompt_length": 400, "max_response_length": 12, "return_raw_chat": True, **changes}
    config = make_config(**settings)
    return RLHFDataset(path, tokenizer, config, max_samples=max_samples, cache_dir=cache, turns=turns)


def content(dataset):
    rows = [dataset[number] for number in range(len(dataset))]
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]


def write(tmp_path, kind, rows=CONVERSATIONS, name="talks"):
    if kind == "jsonl":
        return write_jsonl(tmp_path / f"{name}.jsonl", rows)
    # Tools as a text, because parquet puts null fields into lists of different ones.
    names = dict.fromkeys(key for row in rows for key in row)
    cells = {key: [json.dumps(v) if key == "tools" and (v := row.get(key)) else row.get(key) for row in rows]
             for key in names}  # fmt: skip
    pq.write_table(pa.table(cells), tmp_path / f"{name}.parquet")
    return tmp_path / f"{name}.parquet"


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(arrow_rows, "MAPPED_BYTES", 0)
    monkeypatch.setattr(looks, "CACHED_ROWS", 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("template", [TOOLS, byte_tokenizer().chat_template])
def test_turns_are_the_rows_written_by_hand(tmp_path, kind, template):
    path = write(tmp_path, kind)
    for turns, rows in (("all", list(chain(*BY_HAND))), ("last", [rows[-1] for rows in BY_HAND])):
        by_hand = write(tmp_path, kind, rows, name=f"by_hand_{turns}")
        assert content(start(path, turns, template)) == content(start(by_hand, "none", template))
        for limit in ({"truncation": "left"}, {"filter_overlong_prompts": True}):
            few = content(start(path, turns, template, max_prompt_length=90, **limit))
            assert few == content(start(by_hand, "none", template, max_prompt_length=90, **limit))
        few = start(path, turns, template, max_samples=2)
        assert content(few) == content(start(by_hand, "none", template, max_samples=2))


def test_a_file_of_plain_rows_is_the_same_with_turns(tmp_path):
    path = write_jsonl(tmp_path / "plain.jsonl", BY_HAND[2] + BY_HAND[4])
    plain = content(start(path))
    assert content(start(path, "last")) == plain
    # The first answer stands twice: in the first row, and in the history of the second.
    assert [row["teacher_text"] for row in content(start(path, "all"))] == ["two", "two", "four", "row"]


def test_turns_of_texts_are_what_convert_writes(tmp_path):
    names = {"content": "messages"}
    talks = [{names.get(key, key): value for key, value in row.items()} for row in CONVERSATIONS[:2]]
    bad = [{"messages": messages} for name in ("an answer first", "an empty answer") for messages in BAD[name][:1]]
    path = write_jsonl(tmp_path / "talks.jsonl", [*talks, *bad])
    for turns in ("all", "last"):
        written = tmp_path / f"{turns}.jsonl"
        convert([str(path), "--out", str(written), "--turns", turns])
        ours = start(path, turns, prompt_key="messages", on_bad_row="skip")
        theirs = content(start(written))
        for row in theirs:
            del row["index"], row["uid"]
        assert [{k: v for k, v in row.items() if k not in ("index", "uid")} for row in content(ours)] == theirs


BAD = {
    "an answer first": (talk("a:hi", "u:q", "a:yes"), {0: "begins with an answer that nobody asked for"}),
    "behind a system message": (talk("s:x", "a:hi", "u:q", "a:yes"), {0: "begins with an answer that nobody asked"}),
    "two answers": (talk("u:q", "a:one", "a:two"), {1: "ends in a message of the 'assistant' role"}),
    "an empty answer": (talk("u:q", "a: ", "u:r", "a:yes"), {0: "the answer in 'content' is empty"}),
    "no text": ([*talk("u:q"), {"role": "assistant", "content": None}], {0: "the answer in 'content' is null"}),
    "a broken message": ([*talk("u:q", "a:yes"), 3, *talk("a:no")], {1: "is not {role: text, content: text}"}),
    "half a character": (talk("u:q", "a:yes", "u:\ud800", "a:no"), {1: "half of a surrogate pair"}),
    "no end": (talk("u:q", "a:yes", "u:r"), {1: "the conversation ends without an answer"}),
    "no answer": (talk("u:q"), {0: "there is no assistant message"}),
    "nobody": (talk("s:q"), {0: "there is no assistant message"}),
    "only calls": ([*talk("u:q"), CALL], {None: "none of its assistant messages is to be learnt from"}),
    "no list": ("q", {None: "'content' is not a list of chat messages but str"}),
    "no messages": ([], {None: "'content' has no chat messages"}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_turn_is_named_or_left_out_with_a_count(tmp_path, name, caplog):
    messages, bad = BAD[name]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(CONVERSATIONS[0]) + "\n" + json.dumps({"content": messages}) + "\n")
    with pytest.raises(ValueError) as error:
        start(path, "all")
    lines = [line for line in str(error.value).splitlines() if str(path) in line]
    for line, (turn, says) in zip(lines, bad.items(), strict=True):
        place = f"{path}, row 1" if turn is None else f"{path}, row 1, turn {turn}"
        assert line.strip().startswith(f"{place}: ") and says in line
    with caplog.at_level(logging.WARNING):
        sound = start(path, "all", on_bad_row="skip")
    answers = [m["content"] for m in messages if isinstance(m, dict) and m["role"] == "assistant"]
    wanted = [text for turn, text in enumerate(answers) if turn not in bad and None not in bad]
    assert [row["teacher_text"] for row in sound][3:] == wanted
    assert any(f"left out {len(bad)} of " in record.message for record in caplog.records)


def test_what_the_template_refuses_is_named_with_its_turn(tmp_path):
    path = write_jsonl(tmp_path / "talks.jsonl", [{"content": talk("u:q", "a:a", "u:r", "u:s", "a:b")}])
    with pytest.raises(ValueError, match=r"talks\.jsonl, row 0, turn 1: the chat template refuses it .*alternate"):
        start(path, "all", ALTERNATING)
    with pytest.raises(ValueError, match=r"the prompt of .*talks\.jsonl, row 0, turn 1 \(counted from 0\) has"):
        start(path, "all", max_prompt_length=60)


def test_other_bad_rows_are_named_as_ever(tmp_path):
    path = tmp_path / "talks.jsonl"
    both = {"content": talk("u:q", "a:a"), "teacher_response": "b"}
    path.write_text("\n".join([json.dumps(both), "{", json.dumps({"prompt": "q"}), json.dumps(CONVERSATIONS[0])]))
    with pytest.raises(ValueError) as error:
        start(path, "all")
    says = str(error.value)
    assert "3 of 7 rows cannot be used" in says
    assert "row 0, turn 1: 'content' ends in a message of the 'assistant' role" in says
    assert "talks.jsonl, line 2 (from 1) is not JSON" in says
    assert "row 2: there is no column 'content', only 'prompt'" in says


def test_what_stays_in_the_history_only_is_counted(tmp_path, caplog):
    marked = [*talk("u:q"), {"role": "assistant", "content": "bad", "weight": 0}, *talk("u:r", "a:good")]
    path = write_jsonl(tmp_path / "talks.jsonl", [{"content": marked}, CONVERSATIONS[3]])
    with caplog.at_level(logging.INFO):
        dataset = start(path, "all")
    assert [row["teacher_text"] for row in dataset] == ["good", "It is 2."]
    assert dataset[0]["raw_prompt"][1]["content"] == "bad"
    assert [row.place for row in dataset.rows] == [f"{path}, row 0, turn 1", f"{path}, row 1, turn 1"]
    assert "2 rows to train on from 2 conversations" in caplog.text
    assert "2 assistant messages stay in the history" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_next_start_looks_at_nothing_and_other_turns_are_other_looks(tmp_path, large, monkeypatch, kind):
    path, cache = write(tmp_path, kind), tmp_path / "cache"
    first = {turns: content(start(path, turns, cache=cache)) for turns in ("all", "last")}
    for what, count in (("rows", 1), ("turns", 2), ("looks", 2)):
        found = [file for file in cache.glob(f"{what}-*") if file.suffix != ".lock"]
        assert len(found) == count
    monkeypatch.setattr(faults, "render_prompt", None)
    monkeypatch.setattr(turns_module, "_only_history", None)
    for turns, rows in first.items():
        again = start(path, turns, cache=cache)
        assert content(again) == rows
        assert content(pickle.loads(pickle.dumps(again))) == rows


def test_turns_are_read_in_any_order_and_each_conversation_once(tmp_path, monkeypatch):
    talks = [{"content": talk(*[f"{'ua'[n % 2]}:{row}.{n}" for n in range(2 * (row % 4 + 1))])} for row in range(40)]
    file = FileRows(write_jsonl(tmp_path / "talks.jsonl", talks), Cache(tmp_path / "cache"))
    turns = TurnRows(file, "all", "content", "teacher_response", Cache(tmp_path / "cache"))
    wanted = [f"{row}.{2 * turn + 1}" for row in range(40) for turn in range(row % 4 + 1)]
    assert [record["teacher_response"] for record in turns.records(0, len(turns))] == wanted
    assert [record["teacher_response"] for record in turns.records(7, 23)] == wanted[7:23]
    assert turns.record(57)["teacher_response"] == wanted[57]
    monkeypatch.setattr("verl.utils.dataset.rows.ROWS_AT_ONCE", 6)
    rows = Rows([turns, turns])
    assert [row.record["teacher_response"] for row in rows] == wanted * 2
    # A run that goes on after 8 of the rows reads what it would have read.
    orders = [list(EpochBatches(len(rows), 4, n, seed=3, start=s)) for n, s in ((6, 0), (4, 8))]
    assert orders[0][2:] == orders[1]


messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "assistant", "system", "tool", "Model", "", None]),
                "content": st.sampled_from(["", " ", "q", "好", "a<eos>", None, ["x"], 3]),
            },
            optional={"tool_calls": st.sampled_from([None, [], [ADD], "x"]), "weight": st.sampled_from([0, 1, None])},
        ),
        st.sampled_from([None, 3, "q", [], {}]),
    ),
    max_size=6,
)
records = st.fixed_dictionaries(
    {}, optional={"content": st.one_of(messages, messages, st.none(), st.just("q")),
                  "teacher_response": st.sampled_from([None, "", "yes", 3])},
)  # fmt: skip


@tries(150)
@given(st.lists(records, min_size=1, max_size=4), st.sampled_from(["all", "last"]), st.sampled_from(["error", "skip"]))
def test_any_conversation_gives_rows_or_a_sentence(rows, turns, on_bad_row):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "talks.jsonl", rows)
        dataset = refused_or(lambda: start(path, turns, on_bad_row=on_bad_row))
        for row in [] if dataset is None else dataset.rows:
            record, said = row.record, rows[row.number]["content"]
            before = len(record["content"])
            assert record["content"] == said[:before]
            answer = said[before]["content"] if before < len(said) else rows[row.number]["teacher_response"]
            assert record["teacher_response"] == answer and answer.strip()
