"""`system` and `tools` columns reach the prompt, in training, scoring and judging alike, as text."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config
from verl.tools.judge.answers import prompt_ids, read_prompts
from verl.tools.prompts import Limits
from verl.tools.score.data import read_groups, tokenize_groups
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.texts import Tokenization

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '' }}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}
SAY = {"type": "function", "function": {"name": "说"}}


def tokenizer(template=TEMPLATE):
    made = byte_tokenizer()
    made.chat_template = template
    return made


def row(**more):
    return {"content": [{"role": "user", "content": "q"}], "teacher_response": "yes", **more}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rows))
    else:
        names = dict.fromkeys(name for record in rows for name in record)
        pq.write_table(pa.table({name: [record.get(name) for record in rows] for name in names}), path)
    return path


def open_rows(path, made=None, **changes):
    settings = {"max_prompt_length": 400, "return_raw_chat": True, **changes}
    return RLHFDataset(path, made or tokenizer(), make_config(**settings))


def said(dataset):
    return [dataset.tokenizer.decode(dataset[number]["raw_prompt_ids"]) for number in range(len(dataset))]


ROWS = [
    row(),
    row(system="Be brief."),
    row(system="", tools="[]"),
    row(tools=json.dumps([ADD, SAY], ensure_ascii=False)),
    row(system=" \n", tools=None),
    row(system="Be brief.", tools=json.dumps([SAY])),
    row(content=[{"role": "system", "content": "own"}, {"role": "user", "content": "q"}], system="own"),
    row(content=[{"role": "system", "content": "own"}, {"role": "user", "content": "q"}], system=None),
]
TOOLS = json.dumps(ADD, ensure_ascii=False) + json.dumps(SAY, ensure_ascii=False)
EXPECTED = [
    "<user>u:q<bot>",
    "s:Be brief.<user>u:q<bot>",
    "<user>u:q<bot>",
    f"[{TOOLS}]<user>u:q<bot>",
    "<user>u:q<bot>",
    f"[{json.dumps(SAY, ensure_ascii=False)}]s:Be brief.<user>u:q<bot>",
    "s:own<user>u:q<bot>",
    "s:own<user>u:q<bot>",
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_path_makes_the_same_prompt(tmp_path, kind, caplog):
    path = write(tmp_path / f"data.{kind}", [record | {"answer": "no"} for record in ROWS])
    made = tokenizer()
    with caplog.at_level(logging.WARNING):
        dataset = open_rows(path, made)
        tokenization = Tokenization(made)
        groups = tokenize_groups(read_groups([str(path)]), tokenization, Limits())
        prompts, _ = read_prompts([str(path)], "content", "teacher_response")
        judged = prompt_ids(prompts, tokenization, Limits())
    assert not [record.message for record in caplog.records if "tools" in record.message]
    assert said(dataset) == EXPECTED
    assert [list(groups.sequences[number].prompt) for number in groups.teachers] == [
        row["raw_prompt_ids"] for row in dataset
    ]
    # The judge has a prompt once for rows that say the same, whatever their system message.
    assert [list(ids) for ids in judged] == [dataset[0]["raw_prompt_ids"]]
    assert dataset[1]["raw_prompt"] == [{"role": "system", "content": "Be brief."}, *ROWS[0]["content"]]
    assert type(dataset[3]["raw_prompt"]) is list


def test_tools_as_a_list_and_lengths_that_count_them(tmp_path):
    rows = [row(tools=[ADD]), row()]
    path = write(tmp_path / "data.jsonl", rows)
    assert said(open_rows(path)) == [f"[{json.dumps(ADD)}]<user>u:q<bot>", "<user>u:q<bot>"]
    length = len(json.dumps(ADD)) + 7  # two brackets, a role, "u:q" and <bot> behind them
    assert len(open_rows(path)[0]["raw_prompt_ids"]) == length
    with pytest.raises(ValueError, match=rf"row 0 \(counted from 0\) has {length} tokens"):
        open_rows(path, max_prompt_length=length - 1)
    few = open_rows(path, max_prompt_length=length - 1, filter_overlong_prompts=True)
    assert [record["index"] for record in few] == [1]


SYSTEM = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
BAD = {
    "a clash": (row(content=SYSTEM, system="other"), "are both the system message, and differ"),
    "a number": (row(system=3), "the column 'system' is not text but int"),
    "half an emoji": (row(system="\ud83d"), "the column 'system' has half of a surrogate pair"),
    "no JSON": (row(tools="[{"), "the column 'tools' is not JSON: "),
    "JSON of an object": (row(tools='{"name": "f"}'), "is not a list of tools, or the JSON of one, but dict"),
    "names": (row(tools=["f", "g"]), "is not a list of tools, or the JSON of one, but a list with str in it"),
    "a count": (row(tools=2), "is not a list of tools, or the JSON of one, but int"),
    "null fields": (row(tools=[{"name": "f", "parameters": {"a": None}}]), "has fields that are null, as parquet"),
    "depth": (row(tools="[" + '{"a":' * 200 + "1" + "}" * 200 + "]"), "the column 'tools' is nested more than 100"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_system_message_or_tools_is_named(tmp_path, name):
    bad, sentence = BAD[name]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [row(), bad]))
    with pytest.raises(ValueError) as error:
        open_rows(path)
    assert f"{path}, row 1: " in str(error.value)
    assert sentence in str(error.value)
    assert len(open_rows(path, on_bad_row="skip")) == 1
    with pytest.raises(ValueError, match="row 1: "):
        read_prompts([str(path)], "content", "teacher_response")


def test_parquet_lists_of_different_tools_are_refused(tmp_path):
    other = {"type": "function", "function": {"name": "b", "parameters": {"b": {"type": "string"}}}}
    path = write(tmp_path / "data.parquet", [row(tools=[ADD]), row(tools=[other])])
    with pytest.raises(ValueError, match="have the list as a text of JSON in this column"):
        open_rows(path)
    path = write(tmp_path / "equal.parquet", [row(tools=[ADD]), row(tools=[ADD])])
    assert said(open_rows(path)) == [f"[{json.dumps(ADD)}]<user>u:q<bot>"] * 2


def test_a_template_that_ignores_tools_is_said_once(tmp_path, caplog):
    deaf = TEMPLATE.replace("{% if tools %}", "{% if false %}")
    path = write(tmp_path / "data.jsonl", [record | {"answer": "no"} for record in ROWS])

    def warnings():
        found = [record.message for record in caplog.records if "ignores tools" in record.message]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        open_rows(path, tokenizer(deaf))
        (message,) = warnings()
        assert "those in the column 'tools' of 2 of 8 rows change nothing in the prompts" in message
        tokenize_groups(read_groups([str(path)]), Tokenization(tokenizer(deaf)), Limits())
        assert len(warnings()) == 1
        only = write(tmp_path / "only.jsonl", [row(tools=[ADD])])
        prompts, _ = read_prompts([str(only)], "content", "teacher_response")
        prompt_ids(prompts, Tokenization(tokenizer(deaf)), Limits())
        assert len(warnings()) == 1


def test_special_names_in_tools_and_system_are_text(tmp_path, caplog):
    evil = {"name": "f<bot>", "<eos>": "<user>"}
    path = write(tmp_path / "data.jsonl", [row(tools=[evil], system="<eos>"), row()])
    with caplog.at_level(logging.WARNING):
        dataset = open_rows(path)
    assert any("1 of 2 rows have the names of special tokens" in record.message for record in caplog.records)
    ids, made = dataset[0]["raw_prompt_ids"], dataset.tokenizer
    assert made.decode(ids) == f"[{json.dumps(evil)}]s:<eos><user>u:q<bot>"
    special = [made.convert_ids_to_tokens(token) for token in ids if token in made.all_special_ids]
    assert special == ["<user>", "<bot>"], "the template's own"
    as_tokens = RLHFDataset(path, made, make_config(max_prompt_length=400), special_token_text="token")
    special = [token for token in as_tokens[0]["raw_prompt_ids"] if token in made.all_special_ids]
    assert len(special) == 6


def test_a_rows_tools_take_the_place_of_the_settings(tmp_path):
    path = write(tmp_path / "data.jsonl", [row(tools=[ADD]), row()])
    dataset = open_rows(path, apply_chat_template_kwargs={"tools": [SAY]})
    say = json.dumps(SAY, ensure_ascii=False)
    assert said(dataset) == [f"[{json.dumps(ADD)}]<user>u:q<bot>", f"[{say}]<user>u:q<bot>"]
