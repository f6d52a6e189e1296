"""What is found in data, and what is not: each kind on rows of which it is known."""

import itertools
import json
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_tools.dt_files import write_lines
from tests.tiny import byte_tokenizer
from tests.utils.word_rows import make_config
from verl.data_tools.answers import refuses, refuses_to_help
from verl.data_tools.check import main
from verl.data_tools.check.answers import has_open_fence, without_end
from verl.data_tools.check.findings import KINDS
from verl.data_tools.check.keys import secrets_in
from verl.data_tools.check.languages import identifier, language_of
from verl.data_tools.near import normalise, shingles
from verl.models.tokenizer import load_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset


def row(prompt="What is it?", answer="A thing.", system=None, **more):
    content = [{"role": "system", "content": system}] if system is not None else []
    return {"content": [*content, {"role": "user", "content": prompt}], "teacher_response": answer} | more


def distinct(count):
    """Rows that are like no other."""
    words = ["river", "copper", "lantern", "meadow", "violin", "harbour", "pepper", "glacier", "saddle", "orchid"]
    return [
        row(f"Explain how the {a} and the {b} differ, case {random.Random(number).getrandbits(60):x}.", f"By the {c}.")
        for number, (a, b, c) in enumerate(itertools.islice(itertools.permutations(words, 3), count))
    ]


def checked(tmp_path, capsys, rows, *flags, code=0):
    """The report as JSON: the rows of each kind that were found, in order, and all of it."""
    path = write_lines(tmp_path / "train.jsonl", rows)
    out = tmp_path / "flagged.jsonl"
    assert main([str(path), "--json", "-", "--out", str(out), "--overwrite", *flags]) == code
    report = json.loads(capsys.readouterr().out)
    flagged = [json.loads(line) for line in out.open(encoding="utf-8")]
    found = {
        kind: rows
        for kind in KINDS
        if (rows := [one["row"] for one in flagged if any(flag["kind"] == kind for flag in one["flags"])])
    }
    assert {kind: len(rows) for kind, rows in found.items()} == {
        kind: one["rows"] for kind, one in report["kinds"].items() if one["rows"]
    }
    return found, report


# ---- the command


def test_sound_data_has_nothing(tmp_path, capsys):
    found, report = checked(tmp_path, capsys, distinct(40), "--fail_on", "bad,duplicate,secret")
    assert found == {} and report["rows"] == 40 and report["flagged_rows"] == 0 and report["failed"] == []
    assert main([str(tmp_path / "train.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "something in 0 of 40 rows" in text and "nothing found of: bad, empty, duplicate," in text
    assert "not looked for without --model: template, special_text" in text
    # Of what was not looked for, nobody says that there is none.
    assert "template" not in text.partition("nothing found of: ")[2].splitlines()[0]
    assert [kind for kind, one in report["kinds"].items() if not one["looked_for"]] == [
        "overlap", "near_overlap", "template", "special_text",
    ]  # fmt: skip


def test_bad_rows_are_training_s_and_fail(tmp_path, capsys):
    rows = [*distinct(3), {"content": "text"}, {"content": "text", "teacher_response": "a"}, row(answer=None),
            row(answer=" "), row(prompt=" "), row(answer="half \ud83d."), row(answer=7)]  # fmt: skip
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + '{"content": \n')
    assert main([str(path), "--json", "-", "--examples", "9"]) == 1
    report = json.loads(capsys.readouterr().out)
    reasons = {
        kind: [(one["reason"], one["first"]["row"]) for one in report["kinds"][kind]["reasons"]]
        for kind in ("bad", "empty")
    }
    assert reasons["empty"] == [
        ("the answer is null", 5),
        ("the answer is empty", 6),
        ("the prompt's last message is empty", 7),
    ]
    assert reasons["bad"] == [
        ("there is no column 'teacher_response', only 'content'", 3),
        ("'content' is not a list of chat messages but str", 4),
        ("the answer in 'teacher_response' has half of a surrogate pair, U+D83D, which is not a character", 8),
        ("the answer in 'teacher_response' is not text but int", 9),
        ("it cannot be read", 10),
    ]
    assert "line 11 (from 1) is not JSON" in report["kinds"]["bad"]["examples"][-1]["shown"]
    assert report["failed"] == ["bad", "empty"] and report["kinds"]["bad"]["share"] == pytest.approx(5 / 11)
    assert main([str(path), "--fail_on", "none"]) == 0
    assert "bad                   5   45.45%" in capsys.readouterr().out
    assert main([str(path), "--fail_on", "any"]) == 1
    assert "FAILS" in (text := capsys.readouterr().out) and "found of --fail_on: bad, empty" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--fail_on", "bad,leaks"], "--fail_on: expected kinds of bad, empty,"),
        (["--fail_on", "template"], "template is only looked for with --model; pass that too"),
        (["--fail_on", "near_overlap"], "near_overlap is only looked for with --against"),
        (["--against", "gone.parquet"], "no such data file"),
        (["--model", "gone"], "gone"),
        (["--out", "train.csv"], "--out: expected a file that ends in .parquet or .jsonl"),
        (["--json", "report.txt"], "--json: expected a file that ends in .json"),
    ],
)
def test_wrong_usage_is_a_sentence(tmp_path, capsys, flags, says):
    path = write_lines(tmp_path / "train.jsonl", distinct(2))
    assert main([str(path), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and "Traceback" not in error


def test_without_the_extra_it_is_named(tmp_path, monkeypatch, capsys):
    path = write_lines(tmp_path / "train.jsonl", distinct(2))
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert main([str(path)]) == 2
    assert "datasketch: pip install -e '.[data]'" in capsys.readouterr().err
    monkeypatch.undo()
    # Languages are told all the same, only less of them.
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    identifier.cache_clear()
    assert main([str(path)]) == 0
    identifier.cache_clear()
    assert "languages are told by script only: py3langid" in (text := capsys.readouterr().out)
    assert "Latin letters 100.0%" in text


def test_flagged_rows_and_reports_are_written_once(tmp_path, capsys):
    rows = [*distinct(2), row(answer="x" * 10, answers=[1, "a"]), row(answer="x" * 10)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    out, target = tmp_path / "flagged.parquet", tmp_path / "report.json"
    assert main([str(path), "--out", str(out), "--json", str(target), "--fail_on", "duplicate"]) == 1
    text = capsys.readouterr().out
    assert f"wrote {out}: 1 rows with findings" in text and json.loads(target.read_text())["failed"] == ["duplicate"]
    (flagged,) = pq.read_table(out).to_pylist()
    assert flagged["row"] == 3 and flagged["record"]["teacher_response"] == "x" * 10
    assert flagged["flags"] == [{"kind": "duplicate", "reason": "with the same answer", "shown": "as row 2"}]
    assert main([str(path), "--out", str(out)]) == 2
    assert "is there already; pass --overwrite" in capsys.readouterr().err
    # Files as training takes them: several, of both kinds.
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "more.parquet")
    assert main([str(path), str(tmp_path / "more.parquet"), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"]["duplicate"]["rows"] == 3 and list(report["files"].values()) == [4, 2]


def test_text_from_data_does_not_steer_the_terminal(tmp_path, capsys):
    path = write_lines(
        tmp_path / "train.jsonl", [row(answer="\x1b[2JI'm sorry, but I can't."), row(answer="\x9b31m```\nx")]
    )
    main([str(path)])
    assert not {"\x1b", "\x9b"} & set(capsys.readouterr().out)


# ---- prompts


def test_equal_prompts_whatever_their_case_width_and_spaces(tmp_path, capsys):
    rows = [row("What is it?"), row("what  is\nIT?"), row("Ｗhat is it？"), row("What is it?", system="Brief."),
            row("What is it?", "Another thing.")]  # fmt: skip
    found, report = checked(tmp_path, capsys, rows)
    # The fourth has a system message of its own: for that it is another prompt, much like the others.
    assert found["duplicate"] == [1, 2, 4] and found["near_duplicate"] == [3]
    reasons = {one["reason"]: one["count"] for one in report["kinds"]["duplicate"]["reasons"]}
    assert reasons == {"with the same answer": 2, "with another answer": 1}


ENGLISH = "Write a short story about a lighthouse keeper who finds a letter in a bottle on a stormy night in November"
CHINESE = "请写一个关于灯塔看守人在十一月的暴风雨之夜发现瓶中信的短篇故事，要求语言优美，情节完整，字数在八百字左右"


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_prompts_that_are_much_alike(tmp_path, capsys, text):
    changed = text.replace("stormy", "rainy").replace("优美", "简洁")
    other = text[: len(text) // 2] + (
        "; then explain how bees make honey" if text == ENGLISH else "，然后解释蜜蜂如何酿蜜"
    )
    rows = [row(text), row(changed), row(other), *distinct(5)]
    found, report = checked(tmp_path, capsys, rows)
    assert found == {"near_duplicate": [1]}
    own, theirs = shingles(normalise(text)), shingles(normalise(changed))
    similarity = len(own & theirs) / len(own | theirs)
    assert f"{similarity:.0%} as row 0: " in report["kinds"]["near_duplicate"]["examples"][0]["shown"]
    assert checked(tmp_path, capsys, rows, "--near", "0.99")[0] == {}


def test_shingles_by_hand():
    assert len(shingles("abcdefg")) == 3  # abcde, bcdef, cdefg
    assert len(shingles("灯塔看守")) == 2  # 灯塔看, 塔看守
    assert shingles("a灯塔看守") == {"a灯塔看守", "灯塔看", "塔看守"}
    assert len(shingles("ab")) == 1 and shingles("") == set()
    assert normalise("Ａ b\u3000\nC") == "abc"


def test_alike_prompts_are_those_that_comparing_all_pairs_finds(tmp_path, capsys):
    draw = random.Random(0)
    words = [f"{draw.choice('bcdfgklmnprst')}{draw.choice('aeiou')}{draw.getrandbits(20):x}" for _ in range(400)]
    texts = [" ".join(draw.sample(words, 12)) for _ in range(60)]
    for text in texts[:60]:
        pieces = text.split()
        for place in draw.sample(range(12), draw.randint(0, 3)):
            pieces[place] = draw.choice(words)
        texts.append(" ".join(pieces))
    draw.shuffle(texts)
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in map(normalise, texts)]
    expected, kept = [], []
    for number, own in enumerate(sets):
        if any(len(own & sets[k]) / len(own | sets[k]) >= 0.8 for k in kept):
            expected.append(number)
        else:
            kept.append(number)
    found, _ = checked(tmp_path, capsys, [row(text) for text in texts])
    assert sorted(found.get("near_duplicate", []) + found.get("duplicate", [])) == expected and len(expected) > 20


def test_turns_of_one_conversation_are_not_alike(tmp_path, capsys):
    first = [{"role": "user", "content": ENGLISH}]
    more = [*first, {"role": "assistant", "content": "Once."}, {"role": "user", "content": "Go on."}]
    rows = [{"content": first, "teacher_response": "Once."}, {"content": more, "teacher_response": "Then."}]
    assert checked(tmp_path, capsys, rows)[0] == {}


def test_a_frame_that_all_prompts_have_does_not_make_them_alike(tmp_path, capsys):
    frame = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    framed = [row(f"{frame} {one['content'][0]['content']}", system=frame * 3) for one in distinct(30)]
    assert checked(tmp_path, capsys, framed)[0] == {}


def test_what_test_data_has_too(tmp_path, capsys):
    test = write_lines(tmp_path / "test.jsonl", [row(ENGLISH, system="Brief."), row(CHINESE), row(answer="")])
    rows = [*distinct(3), row(ENGLISH.upper()), row(CHINESE.replace("优美", "简洁"))]
    found, report = checked(tmp_path, capsys, rows, "--against", str(test), code=1)
    assert found == {"overlap": [3], "near_overlap": [4]} and report["failed"] == ["overlap"]
    assert report["against_rows"] == 3
    assert report["kinds"]["overlap"]["examples"][0]["shown"] == f"as {test}, row 0"
    assert any("of --against, 1 rows are bad or empty; the first is" in note for note in report["notes"])


# ---- answers

CUT = ["text\n```python\nx = 1", "1. ```\na\n```\n2. ~~~\nb", "````\n```\nx"]
WHOLE = ["```python\nx = 1\n```", "- ```\n  x\n  ```", "```` \n```\n````", "use ```x``` here", "```\nx```", "plain"]


def test_open_blocks_of_code():
    assert all(map(has_open_fence, CUT)) and not any(map(has_open_fence, WHOLE))


@pytest.mark.parametrize(
    "text",
    [
        "The first point is clear. The second, which follows from what was said before it, is that every",
        "It rained. So we stayed inside the whole day long, and played cards, chess,",
        "灯塔在海边。看守人每天晚上都会点亮灯塔的灯，直到有一天他在海滩上发现了一个瓶子，瓶子里有一封信，信上写着他已经",
    ],
)
def test_prose_that_stops_within_a_sentence(text):
    assert without_end(text) and not without_end(text + ("." if text.isascii() else "。"))


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "Paris",
        "A list of things that there are. All of them:\n- the first one, which is long enough to count\n- the second",
        "#!/bin/sh\n# Finds it.\nfind . -type f -name something -mtime 7 -print",
        "Here is the code. It prints.\n\nfor item in list_of_items_that_is_long(): print(item)",
        "I am grateful for your support in this mission. Yours sincerely, Dr. Jane Goodall of Gombe",
        '"Believe you can and you\'re halfway there." – Theodore Roosevelt, who was president',
        "Roses are red\nviolets are blue\nand this is a line of a poem without any mark",
        "See the page. It is at https://example.org/a/long/address/of/a/page/that/ends",
        "They sang 🎵 all night long, and nobody in the village slept. We danced until the sun came up 🎉",
    ],
)
def test_answers_that_end_where_they_end(text):
    assert not without_end(text)


REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m really sorry, but I can’t help with this request.",
    "Sorry, I cannot provide medical advice.",
    "As an AI language model, I do not have access to real-time data.",
    "I apologize, but I'm unable to open links.",
    "I cannot browse the internet.",
    "Unfortunately, I am not able to fulfill this request.",
    "对不起，我无法回答您的问题。",
    "很抱歉，作为一个文本机器人，我不能直接生成三维图像。",
    "作为一个人工智能助手，我无法看到物体。",
    "抱歉，我不能提供这方面的帮助。",
    "對不起，我無法提供這個資訊。",
]
ANSWERS = [
    "I'm sorry to hear that you are not well. Rest, and drink tea.",
    "I can help with that: first, open the file.",
    "You could say: I'm sorry, but I can't come to the party.",
    "An AI language model predicts the next word.",
    "I cannot believe how beautiful the sea was that day.",
    "作为一名教师，我每天都很忙。",
    "对不起是一个常用的道歉用语。",
    "人工智能是计算机科学的一个分支，无法用一句话概括。",
]


def test_refusals_in_english_and_chinese():
    assert [text for text in REFUSALS if not refuses(text)] == []
    assert [text for text in ANSWERS if refuses(text)] == []


def test_refusals_that_name_a_task_are_told_from_those_that_may_help_all_the_same():
    helpless = ["I'm sorry, but I can't help with that.", "As an AI, I cannot write this.",
                "抱歉，我无法回答这个问题。", "I must decline to discuss that."]  # fmt: skip
    helping = ["As an AI, I cannot feel joy. But here is a poem:",
               "Unfortunately, I can't say when. Here is what helps:",
               "作为人工智能，我无法拥有超能力。但我可以提供一些建议。"]  # fmt: skip
    assert [refuses_to_help(text) for text in helpless + helping] == [True] * 4 + [False] * 3
    assert all(map(refuses, helpless + helping)) and not any(map(refuses_to_help, ANSWERS))


def test_cut_and_refused_answers_are_found_in_rows(tmp_path, capsys):
    rows = distinct(8)
    rows[1]["finish_reason"], rows[2]["finish_reason"] = "length", "stop"
    rows[3]["teacher_response"], rows[4]["teacher_response"] = CUT[0], REFUSALS[7]
    rows[5]["teacher_response"] = "It rained. So we stayed inside the whole day long, and played cards, chess,"
    found, report = checked(tmp_path, capsys, rows)
    assert found == {"refused": [4], "cut": [1, 3], "no_end": [5], "language": [4]}
    assert [one["reason"] for one in report["kinds"]["cut"]["reasons"]] == [
        "finish_reason is length",
        "a code block is not closed",
    ]


# ---- languages


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The keeper lit the lamp every evening, and the ships found their way home through the storm.", "en"),
        ("Der Wärter zündete jeden Abend die Lampe an, und die Schiffe fanden durch den Sturm nach Hause.", "de"),
        ("灯塔看守人每天晚上点亮灯，使用 Python 的 pandas 库记录。", "Chinese"),
        ("灯台守は毎晩ランプを灯し、船は嵐の中を家に帰りました。", "Japanese"),
        ("등대지기는 매일 저녁 등불을 켰고 배들은 폭풍 속에서 집으로 돌아왔다.", "Korean"),
        ("Маяк светил каждую ночь, и корабли шли домой сквозь бурю и туман, а смотритель читал старые книги.", "ru"),
        ("42", "no words"),
        ("```python\nprint('a long program of Latin letters')\n```\n这是一个程序，它会打印一行文字。", "Chinese"),
    ],
)
def test_the_language_of_a_text(text, language):
    assert str(language_of(text)) == language


def test_answers_in_another_language(tmp_path, capsys):
    german = "Der Wärter zündete jeden Abend die Lampe an, und die Schiffe fanden durch den Sturm nach Hause."
    rows = [
        row(ENGLISH + ".", german), row(CHINESE, "好的，很久以前有一个灯塔看守人。"),
        row("请解释一下什么是灯塔以及它的作用", "A lighthouse is a tower with a lamp."),
        row("你能给我一个数字吗？我需要一个数字。", "42"),
    ]  # fmt: skip
    found, report = checked(tmp_path, capsys, rows)
    assert found["language"] == [0, 2]
    assert report["languages"]["prompts"] == {"en": 1, "Chinese": 3}
    assert report["languages"]["answers"] == {"de": 1, "Chinese": 1, "Latin letters": 1, "no words": 1}


# ---- secrets

BODY = "Qm7Zk2Xw9LpT4vRs8YhN3cJd6FgB5aUe1oKiVtMx"
SECRETS = {
    "a private key": f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}{BODY}\n-----END RSA PRIVATE KEY-----",
    "an AWS access key id": "AKIA" + "QK5WZ7TJ3MNB2XPL",
    "an AWS secret key": f"aws_secret_access_key = {BODY}",
    "an Anthropic key": f"sk-ant-api03-{BODY}",
    "an OpenAI key": f"sk-proj-{BODY}",
    "an API key (sk-...)": f"sk-{BODY}",
    "a Google API key": f"AIza{BODY[:35]}",
    "a GitHub token": f"ghp_{BODY[:36]}",
    "a GitLab token": f"glpat-{BODY[:20]}",
    "a Hugging Face token": "hf_" + "QmZkXwLpTvRsYhNcJdFgBaUeoKiVtMxWqP",
    "a Slack token": f"xoxb-{BODY[:30]}",
    "a Slack webhook": f"https://hooks.slack.com/services/T{BODY[:8]}/B{BODY[:8]}/{BODY[:24]}",
    "a Stripe key": f"sk_live_{BODY[:24]}",
    "a SendGrid key": f"SG.{BODY[:22]}.{BODY}",
    "a Twilio key": "SK" + "9f86d081884c7d659a2feaa0c55ad015",
    "an npm token": f"npm_{BODY[:36]}",
    "a PyPI token": f"pypi-AgEIcHlwaS5vcmc{BODY}{BODY}",
    "an Alibaba Cloud key id": f"LTAI{BODY[:20]}",
    "a Tencent Cloud key id": f"AKID{BODY[:32]}",
    "a JSON web token": f"eyJ{BODY[:20]}.eyJ{BODY[:30]}.{BODY}",
    "an address with a password": "postgres://admin:hG7!kq2Zw@db.internal:5432/app",
}
HARMLESS = [
    "AKIAIOSFODNN7EXAMPLE", "sk-" + "x" * 40, "export OPENAI_API_KEY=sk-your-key-here", "ghp_" + "0" * 36,
    "postgres://user:password@localhost/db", "https://example.org:8080/a@b", "-----BEGIN PUBLIC KEY-----\nMIIB\n",
    "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----", "commit 9f86d081884c7d659a2feaa0c55ad0",
    "redis://:${REDIS_PASSWORD}@host", "task-3a91", "LTAI", "data:image/png;base64," + BODY * 3,
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_keys_of_known_shapes(name):
    assert [kind for kind, _ in secrets_in(f"It is {SECRETS[name]} .")] == [name]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_key(text):
    assert list(secrets_in(text)) == []


def test_secrets_are_never_shown(tmp_path, capsys):
    path = write_lines(tmp_path / "train.jsonl", [row(f"Mend this. {secret}", secret) for secret in SECRETS.values()])
    report = tmp_path / "report.json"
    assert main([str(path), "--fail_on", "secret", "--examples", "99", "--json", str(report)]) == 1
    shown = capsys.readouterr().out.partition("\nsecret: ")[2].partition("\n\n")[0]
    assert "an AWS access key id in the prompt; first in" in shown and "AKIA*** (20 characters)" in shown
    examples = [one["shown"] for one in json.loads(report.read_text())["kinds"]["secret"]["examples"]]
    assert not [text for text in [shown, *examples] if BODY[:12] in text or "hG7!kq2Zw" in text]


# ---- lengths


def test_outliers_by_hand(tmp_path, capsys):
    rows = distinct(30)
    rows[7]["teacher_response"] = "word " * 200 + "end."
    rows[9]["content"][0]["content"] = "Why?"
    found, report = checked(tmp_path, capsys, rows)
    assert found == {"long": [7], "short": [9]}
    assert report["kinds"]["long"]["examples"][0]["shown"].startswith("1,004 characters; of half of the rows ")
    # Of fewer rows nobody knows what is usual.
    assert checked(tmp_path, capsys, rows[:12])[0] == {}


# ---- the model's own reading

SOUND = byte_tokenizer().chat_template


def model_with(folder, template=SOUND, **changes):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for name, change in changes.items():
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content[name] = change
        file.write_text(json.dumps(content))
    return str(folder)


def test_texts_that_the_template_changes(tmp_path, capsys):
    rows = [row("one", "yes\n"), row(" two ", "no"), row("three", "it", system="Brief."), row("four", "Über 你好 🎉")]
    assert checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "sound"))[0] == {}

    stripping = SOUND.replace("m['content'] }}", "m['content'] | trim }}")
    found, report = checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "strip", stripping))
    assert found == {"template": [1]}
    (reason,) = report["kinds"]["template"]["reasons"]
    assert reason["reason"] == "a message of the 'user' role loses white space at its ends"

    backwards = SOUND.replace("for m in messages", "for m in messages | reverse")
    found, report = checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "back", backwards))
    assert found == {"template": [2]}
    assert report["kinds"]["template"]["reasons"][0]["reason"] == "the messages are in another order"

    # What training itself refuses is a bad row.
    dropping = SOUND.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    found, report = checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "drop", dropping), code=1)
    assert found == {"bad": [2]}
    assert "leaves out messages of the role 'system'" in report["kinds"]["bad"]["reasons"][0]["reason"]


def test_texts_that_the_tokenizer_changes(tmp_path, capsys):
    rows = [row("one", "yes"), row("two", "Yes it is"), row("three", " no ")]
    lower = model_with(tmp_path / "lower", normalizer={"type": "Lowercase"})
    found, report = checked(tmp_path, capsys, rows, "--model", lower)
    assert found == {"template": [1]}
    assert report["kinds"]["template"]["reasons"][0]["reason"] == "the answer has other capital letters"
    strip = model_with(tmp_path / "strip", normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    found, report = checked(tmp_path, capsys, rows, "--model", strip)
    assert found == {"template": [2]}
    assert report["kinds"]["template"]["reasons"][0]["reason"] == "the answer loses white space at its ends"


def test_an_answer_of_which_no_token_is_left(tmp_path, capsys):
    rows = [row("one", "yes"), row("two", "<eos>")]
    found, report = checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "model"), code=1)
    assert found == {"bad": [1]}
    assert report["kinds"]["bad"]["reasons"][0]["reason"] == "the tokenizer makes no token of the answer"


def test_bad_rows_are_those_that_training_skips(tmp_path, capsys):
    deep = {}
    for _ in range(120):
        deep = {"in": deep}
    user = {"role": "user", "content": "q"}
    contents = [
        [user], [user, user], [], None, "q", [7], [{"role": "user"}], [user, {"role": "assistant", "content": "a"}],
        [user | {"x": deep}], [{"role": "system", "content": "s"}, user], [{"role": "user", "content": "\ud83d"}],
    ]  # fmt: skip
    answers = ["a", "", None, 7, "<eos>", " \n", "a<eos>", ["a"], "\udc00"]
    rows = [{"content": content, "teacher_response": "a"} for content in contents]
    rows += [{"content": [user], "teacher_response": answer} for answer in answers]
    rows += [
        {"content": [user]},
        {"teacher_response": "a"},
        {"content": [user], "teacher_response": "a", "extra_info": deep},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + "{\n[]\n")
    dropping = SOUND.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    model = model_with(tmp_path / "model", dropping)
    kept = {one["index"] for one in RLHFDataset(path, load_tokenizer(model), make_config(on_bad_row="skip"))}
    assert main([str(path), "--model", model, "--json", "-", "--out", str(tmp_path / "out.jsonl")]) == 1
    flagged = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    bad = {one["row"] for one in flagged if any(flag["kind"] in ("bad", "empty") for flag in one["flags"])}
    assert bad == set(range(len(rows) + 2)) - kept and len(kept) == 4
    capsys.readouterr()


def test_half_of_a_character_in_a_report(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row(answer="I'm sorry, but I can't.") | {"finish_reason": "\ud83d"}) + "\n")
    assert main([str(path), "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "o.parquet")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["kinds"]["refused"]["rows"] == 1
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 1
    capsys.readouterr()


def test_names_of_special_tokens_and_lengths_in_tokens(tmp_path, capsys):
    rows = [row("one", "yes<eos>"), row("What does <bot> mean?", "It <eos> ends."), row("three", "<unknown>")]
    found, report = checked(tmp_path, capsys, rows, "--model", model_with(tmp_path / "model"))
    # An end of an answer at its end is what it says.
    assert found == {"special_text": [1]}
    assert report["kinds"]["special_text"]["reasons"][0]["reason"] == "<bot>, <eos>"
    assert report["lengths"]["unit"] == "tokens"
    # A byte is a token here: <user>, the text and <bot>; the answer and its end.
    assert report["lengths"]["prompts"]["least"] == 3 + 2 and report["lengths"]["answers"]["least"] == 3 + 1
