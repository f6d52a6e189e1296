"""Rows that no prompt, or not the right one, can be made of: found before anything starts, and named."""

import json
import logging
import time

import pytest

from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config
from verl.utils.dataset import faults
from verl.utils.dataset.faults import MAX_DEPTH, fault_of_depth
from verl.utils.dataset.rl_dataset import RLHFDataset

KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user'] %}<user>{{ m.content | trim }}"
    "{% elif m.role == 'assistant' %}<bot>{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}<bot>"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if '[' in m.content %}{{ m.tools[0].name }}{% endif %}{{ m.content }}{% endfor %}<bot>"
)


def row(*messages, answer="yes", **more):
    return {"content": [{"role": r, "content": text} for r, text in messages], "teacher_response": answer, **more}


GOOD = row(("user", "q"))


def tokenizer(template=None):
    made = byte_tokenizer()
    made.chat_template = template or made.chat_template
    return made


def open_rows(tmp_path, rows, template=None, **changes):
    path = tmp_path / "data.jsonl"
    # As ASCII: half a surrogate pair can be written as an escape only.
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    return RLHFDataset(path, tokenizer(template), make_config(max_prompt_length=64, max_response_length=48, **changes))


def deep(levels: int):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


BAD_ROWS = {
    "the template raises": (NO_SYSTEM, row(("system", "s"), ("user", "q")), "refuses it (TemplateError: System role"),
    "the template fails": (NO_SYSTEM, row(("user", "[1]")), "the chat template refuses it (UndefinedError"),
    "the template reaches for the system": (
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        row(("user", "q")),
        "the chat template refuses it (SecurityError",
    ),
    "human": (KNOWN_ROLES, row(("human", "q")), "leaves out messages of the role 'human'"),
    "developer": (KNOWN_ROLES, row(("developer", "d"), ("user", "q")), "leaves out messages of the role 'developer'"),
    "a word that is elsewhere": (KNOWN_ROLES, row(("tool", "q"), ("user", "q")), "messages of the role 'tool'"),
    "nothing left": ("{{ '' }}", row(("user", "q")), "makes an empty prompt of it"),
    "assistant": (None, row(("user", "q"), ("assistant", "a")), "ends in a message of the 'assistant' role"),
    "gpt": (None, row(("user", "q"), ("GPT", "a")), "ends in a message of the 'GPT' role"),
    "half an emoji in an answer": (None, row(("user", "q"), answer="a \ud83d"), "half of a surrogate pair, U+D83D"),
    "the other half": (None, row(("user", "\ude00 q")), "a message of 'content' has half of a surrogate pair, U+DE00"),
    "in a role": (None, row(("us\udc80er", "q")), "a role of 'content' has half of a surrogate pair, U+DC80"),
    "in a field that the template prints": (
        "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}<bot>",
        {"content": [{"role": "user", "content": "q", "name": "\ud83d"}], "teacher_response": "yes"},
        "what the chat template makes of it has half of a surrogate pair",
    ),
    "deep extra_info": (None, GOOD | {"extra_info": {"a": deep(200)}}, "'extra_info' is nested more than 100 levels"),
    "a deep message": (
        None,
        {"content": [{"role": "user", "content": "q", "tools": deep(200)}], "teacher_response": "yes"},
        "a message of 'content' is nested more than 100 levels",
    ),
    "all fields null": (
        None,
        {"content": [{"role": None, "content": None, "from": "human"}], "teacher_response": "yes"},
        "a message of 'content' is not {role: text, content: text}",
    ),
    "an answer that is all EOS": (None, row(("user", "q"), answer=" <eos><eos>\n"), "makes no token of the answer"),
}


# Templates with which no row is good.
ALL_BAD = ("{{ '' }}", BAD_ROWS["the template reaches for the system"][0])


@pytest.mark.parametrize("truncation", ["error", "left"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(tmp_path, name, truncation, caplog):
    template, bad, fault = BAD_ROWS[name]
    good = row(("user", "p"))
    rows = [good, bad, good] if template not in ALL_BAD else [bad]
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, rows, template, truncation=truncation)
    place = f"{tmp_path / 'data.jsonl'}, row {rows.index(bad)}: "
    assert any(place in text and fault in text for text in str(error.value).splitlines()), str(error.value)
    if len(rows) == 3:
        with caplog.at_level(logging.WARNING):
            dataset = open_rows(tmp_path, rows, template, truncation=truncation, on_bad_row="skip")
        assert [item["index"] for item in dataset] == [0, 2]
        assert any("left out 1 of 3 rows: 1 x" in record.message for record in caplog.records)


def test_what_is_fine_passes(tmp_path):
    """Roles that the template knows, in any order; thoughts that it takes out; whole emoji; an answer in the middle."""
    rows = [
        row(("system", " s "), ("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r")),
        row(("user", "q"), ("assistant", ""), ("user", "👍🏽")),
        row(("system", "only")),
        GOOD | {"extra_info": {"a": deep(50)}},
        {"content": [{"role": "user", "content": "q", "tool_calls": None}], "teacher_response": "y"},
    ]
    assert len(open_rows(tmp_path, rows, KNOWN_ROLES, truncation="left")) == 5


def test_a_template_that_does_not_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "TEMPLATE_SECONDS", 0.2)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "ab") + "{% endfor %}" * 2 + "<bot>"
    for on_bad_row in ("error", "skip"):
        with pytest.raises(ValueError, match=r"chat template of .* does not end: .*after 0\.2 s; use another"):
            open_rows(tmp_path, [GOOD], loops, on_bad_row=on_bad_row)


def test_a_text_of_100_mb_is_a_bad_row(tmp_path, caplog):
    """Which would take minutes to tokenise, and is not."""
    rows = [row(("user", "q"), answer="a" * 100_000_000), row(("user", "a" * 10_000_001)), GOOD]
    start = time.process_time()
    assert len(open_rows(tmp_path, rows, on_bad_row="skip")) == 1
    assert time.process_time() - start < 20
    assert "1 x the answer in 'teacher_response' has more than 10,000,000 characters" in caplog.text
    assert "1 x a message of 'content' has more than 10,000,000 characters" in caplog.text


def test_depth():
    assert fault_of_depth(deep(MAX_DEPTH), "x") is None
    assert "x is nested" in fault_of_depth(deep(MAX_DEPTH + 1), "x")
    assert "x is nested" in fault_of_depth(deep(100_000), "x")
    assert fault_of_depth({"a": [{"b": 1}, 2], "c": None}, "x") is None and fault_of_depth(None, "x") is None


# ---- where the prompt ends and the answer begins


def opening(tail: str) -> str:
    return "{% for m in messages %}<user>{{ m.content }}{% endfor %}<bot>" + tail


@pytest.mark.parametrize(
    ("tail", "answer", "fault"),
    [
        ("<think>\n", "<think>\nhm\n</think>\nyes", "opens <think>"),
        ("<think>", " \n<think>hm</think>yes", "opens <think>"),
        ("[THINK]", "[THINK]hm[/THINK]yes", "opens [THINK]"),
        ("◁think▷\n", "◁think▷hm◁/think▷yes", "opens ◁think▷"),
        ("<think>\n\n</think>\n\n", "<think>hm</think>yes", "closes <think>"),
        ("", "<bot>yes", "opens <bot>"),
        ("<think>\n", "hm\n</think>\nyes", None),
        ("<think>\n\n</think>\n\n", "yes", None),
        ("", "<think>hm</think>yes", None),
        ("<b>", "<think>hm</think>yes", None),
    ],
)
def test_a_tag_that_the_template_and_the_answer_both_begin_with(tmp_path, tail, answer, fault, caplog):
    rows = [row(("user", "q"), answer=answer)]
    if fault is None:
        with caplog.at_level(logging.WARNING):
            open_rows(tmp_path, rows, opening(tail))
        assert not any("thought" in record.message for record in caplog.records)
    else:
        with pytest.raises(ValueError, match=r"row 0: the chat template") as error:
            open_rows(tmp_path, rows, opening(tail))
        assert fault in str(error.value)


def test_a_tag_of_the_users_own_at_the_end_is_none_of_the_templates(tmp_path):
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}\n"
    assert len(open_rows(tmp_path, [row(("user", "an opening <b>"), answer="<b>yes</b>")], template)) == 1


def test_answers_within_a_thought_that_is_never_closed_are_counted(tmp_path, caplog):
    answers = ["plain", "hm</think>yes", "plain too"]
    with caplog.at_level(logging.WARNING):
        open_rows(tmp_path, [row(("user", "q"), answer=answer) for answer in answers], opening("<think>\n"))
    assert any("opens a thought" in r.message and "2 of 3 answers never close it" in r.message for r in caplog.records)
