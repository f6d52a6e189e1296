"""Sets without a common prompt: groups by hand and against every pair compared, sizes, and the proof."""

import json
import random
import sys
from collections import Counter
from itertools import combinations

import pytest
from scipy.cluster.hierarchy import DisjointSet

from tests.data_tools.teaching import rows_of
from verl.data_tools import split as split_module
from verl.data_tools.near import bands, normalise, shingles
from verl.data_tools.split import assign, find_groups, main, prove, shares

ENGLISH = "Please write a short story about a fox that learns to read the letters which its neighbours throw away."
CHINESE = "请用三百字左右写一个关于小狐狸学会阅读邻居扔掉的旧信件的童话故事，要求语言生动，结尾出人意料。"


def groups_of(*texts, threshold=0.8):
    return find_groups([normalise(text) for text in texts], threshold)


def write(path, prompts, **columns):
    rows = [
        {"content": [{"role": "user", "content": prompt}], "teacher_response": f"answer {index}", "number": index}
        | {name: values[index] for name, values in columns.items()}
        for index, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- groups


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("Hello  World", "hello\nworld", True),
        ("ＨＥＬＬＯ world", "Hello World", True),
        ("Straße", "STRASSE", True),
        ("ﬁne", "fine", True),
        ("你 好", "你好", True),
        ("你好", "你们好", False),
        ("2 + 2 = ?", "2 + 3 = ?", False),
        # One word of 16 and one character of 47 changed; half of it.
        (ENGLISH, ENGLISH.replace("fox", "cat"), True),
        (CHINESE, CHINESE.replace("狐", "松"), True),
        (ENGLISH, "Please write a short story about a king who forgets the names of all his children.", False),
        (CHINESE, "请用三百字左右写一个关于老国王忘记自己孩子姓名的悲剧故事，要求对话简洁，结尾留有余地。", False),
        # Shingles by hand: "abcdefgh" has 4 of five letters, of which "abcdefgX" shares 3: 3 / 5.
        ("abcdefgh", "abcdefgx", False),
    ],
)
def test_what_is_together(one, other, together):
    first, second = groups_of(one, other)
    assert (first == second) == together


def test_shingles_by_hand():
    assert shingles("abcdefgh") == {"abcde", "bcdef", "cdefg", "defgh"}
    assert shingles("你好世界") == {"你好世", "好世界"} and shingles("ab") == {"ab"} and shingles("") == set()
    assert groups_of("abcdefgh", "abcdefgx", threshold=0.6) in ([0, 0], [1, 1])


def test_what_is_near_to_something_near_is_in_the_group():
    chain = [ENGLISH]
    for word, other in (("story", "stary"), ("learns", "leorns"), ("which", "whuch")):
        chain.append(chain[-1].replace(word, other))
    first, *others = groups_of(chain[0], "Something else altogether, on its own.", *chain[1:])
    assert others[0] != first and others[1:] == [first] * 3
    # The ends of the chain alone are not near.
    assert len(set(groups_of(chain[0], chain[-1]))) == 2


def test_prompts_of_one_template_are_apart():
    """Its frame, of which they mostly consist, does not count; a prompt of the frame alone is like itself."""
    frame = "Translate the following sentence into French, and keep its tone, its register and its punctuation: "
    verbs, nouns = ("sings", "sleeps", "waits", "dreams", "paints"), ("fox", "judge", "river", "clock", "widow")
    texts = [f"{frame}The {noun} {verb} beside the {verb[::-1]} door." for noun in nouns for verb in verbs]
    assert len(set(groups_of(*texts, frame))) == 26
    # Without so many to see a frame in, it counts.
    assert len(set(groups_of(*texts[:5], threshold=0.7))) == 1


def test_bands_by_hand():
    # 4 rows in 32 bands: (1 - 0.8^4)^32 = 4.6e-8; 5 in 25: 4.9e-5.
    assert bands(0.8) == (32, 4) and bands(1.0) == (1, 128) and bands(0.1) == (128, 1)


def test_groups_are_those_of_every_pair_compared():
    """MinHash finds what comparing all pairs finds, in English and in Chinese."""
    drawn = random.Random(0)
    letters = {"en": "abcdefghij klmnop", "zh": [chr(0x4E00 + index) for index in range(400)]}
    texts = []
    for number in range(240):
        alphabet = letters["en" if number % 2 else "zh"]
        base = [drawn.choice(alphabet) for _ in range(drawn.randint(20, 90))]
        for _ in range(drawn.randint(1, 3)):
            for _ in range(drawn.randint(0, 3)):
                base[drawn.randrange(len(base))] = drawn.choice(alphabet)
            texts.append(normalise("".join(base)))
    joined = DisjointSet(range(len(texts)))
    own = [shingles(text) for text in texts]
    for one, other in combinations(range(len(texts)), 2):
        if len(own[one] & own[other]) / len(own[one] | own[other]) >= 0.8:
            joined.merge(one, other)
    found = find_groups(texts, 0.8)
    expected = [joined[index] for index in range(len(texts))]
    apart = [
        (a, b) for a, b in combinations(range(len(texts)), 2) if expected[a] == expected[b] and found[a] != found[b]
    ]
    wrong = [
        (a, b) for a, b in combinations(range(len(texts)), 2) if expected[a] != expected[b] and found[a] == found[b]
    ]
    assert 240 < len(set(expected)) < 400 and wrong == [] and apart == []


# ---- sets


def test_shares_by_hand():
    # 7 of 10, 5, 5: 3.5, 1.75, 1.75; the two that are left go to the largest remainders.
    assert shares(7, {"a": 10, "b": 5, "c": 5}) == {"a": 3, "b": 2, "c": 2}
    assert shares(0, {"a": 1}) == {"a": 0} and shares(1, {"a": 1, "b": 1}) == {"a": 1, "b": 0}


def test_groups_stay_whole_and_sizes_are_met():
    groups = [0] * 6 + [1] * 3 + list(range(2, 23))
    for seed in range(20):
        sides = assign(groups, [""] * 30, {"judge": 5, "validation": 7}, seed)
        assert Counter(sides) == {"train": 18, "judge": 5, "validation": 7}
        assert len(set(sides[:6])) == 1 and len(set(sides[6:9])) == 1 and sides[0] != "judge"
    assert sides == assign(groups, [""] * 30, {"judge": 5, "validation": 7}, 19)
    assert sides != assign(groups, [""] * 30, {"judge": 5, "validation": 7}, 0)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_command(tmp_path, capsys, ending):
    prompts = [f"Question {number}: what of {number * 7919}? 第{number * 104729}题" for number in range(90)]
    prompts += [ENGLISH, ENGLISH.upper(), ENGLISH.replace("fox", "cat"), CHINESE, CHINESE + " ", prompts[0]]
    kinds = ["one" if number % 3 else "two" for number in range(96)]
    data = write(tmp_path / "all.jsonl", prompts, kind=kinds)
    out = tmp_path / "sets"
    arguments = [str(data), "--out", str(out), "--validation", "0.25", "--judge", "12", "--stratify", "kind"]
    arguments += ["--format", ending, "--threshold", "0.8"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    sets = {name: rows_of(out / f"{name}.{ending}") for name in ("train", "test", "judge")}
    # 96 rows: 24 and 12; 64 and 32 of them are of the two kinds.
    assert [len(sets[name]) for name in ("train", "test", "judge")] == [60, 24, 12]
    assert Counter(row["kind"] for row in sets["judge"]).keys() == {"one", "two"}
    side = {row["number"]: name for name, rows in sets.items() for row in rows}
    assert len(side) == 96 and len({side[90], side[91], side[92]}) == 1 and side[93] == side[94]
    assert side[0] == side[95]
    assert sets["train"] == sorted(sets["train"], key=lambda row: row["number"])
    assert "96 rows are 92 groups; the largest has 3 rows with 3 different prompts" in said
    assert "read again: every row is there, and no prompt or near-duplicate is in two of them" in said

    assert main(arguments) == 2 and "pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--judge", "0"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"test.{ending}", f"train.{ending}"]
    assert len(rows_of(out / f"train.{ending}")) == 72


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    data = write(tmp_path / "train.jsonl", ["one thing", "another", "第三"])
    for source in (data, tmp_path):
        arguments = [str(source), "--out", str(tmp_path), "--validation", "1", "--format", "jsonl", "--overwrite"]
        assert main(arguments) == 2 and "expected another file than those that are read" in capsys.readouterr().err
    assert len(rows_of(data)) == 3


def test_sets_that_are_not_proven_take_no_names(tmp_path, monkeypatch):
    data = write(tmp_path / "all.jsonl", ["one thing", "another", "第三"])
    arguments = [str(data), "--out", str(tmp_path / "sets"), "--validation", "1", "--overwrite"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "sets").iterdir()}
    monkeypatch.setattr(split_module, "assign", lambda *_: ["train", "validation", "train", "train"])
    write(data, ["one thing", "ONE  thing", "第三", "4"])
    with pytest.raises(RuntimeError, match="shares a prompt"):
        main(arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "sets").iterdir()} == before


def test_a_common_system_message_makes_no_group(tmp_path):
    system = {"role": "system", "content": "You are a helpful assistant who answers at length. " * 20}
    rows = [
        {"content": [system, {"role": "user", "content": text}], "teacher_response": "x"}
        for text in ("What is the tallest mountain?", "Name three rivers.", "为什么天是蓝的？", "写一首诗。")
    ]
    data = tmp_path / "all.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(data), "--out", str(tmp_path), "--validation", "1", "--judge", "1"]) == 0
    assert [len(rows_of(tmp_path / f"{name}.parquet")) for name in ("train", "test", "judge")] == [2, 1, 1]


def test_the_proof_sees_what_is_shared(tmp_path):
    one, other = write(tmp_path / "one.jsonl", ["a b", "c"]), write(tmp_path / "other.jsonl", ["d", "AB"])
    groups = {"ab": 0, "c": 1, "d": 2}
    with pytest.raises(RuntimeError, match=r"other\.jsonl shares a prompt with .*one\.jsonl: AB"):
        prove({"train": one, "judge": other}, groups, 4, "content")
    with pytest.raises(RuntimeError, match="the sets have 2 rows, not 3"):
        prove({"train": one}, groups, 3, "content")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--validation", "4"], "--validation: expected some of 4 rows, got 4"),
        (["--validation", "0.01"], "--validation: expected some of 4 rows, got 0"),
        (["--validation", "1", "--judge", "3"], "expected rows in every set, got none in train"),
        (["--stratify", "kind"], "--stratify: expected a column 'kind' in every row, got 4 of 4 without"),
        (["--prompt_key", "x"], "there is no column 'x'"),
    ],
)
def test_bad_usage_is_a_sentence(tmp_path, capsys, flags, words):
    data = write(tmp_path / "all.jsonl", ["one thing", "another", "第三", "the last of them"])
    assert main([str(data), "--out", str(tmp_path / "sets"), "--validation", "1", *flags]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "sets").exists()


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    data = write(tmp_path / "all.jsonl", ["one thing", "another"])
    assert main([str(data), "--out", str(tmp_path / "sets"), "--validation", "1"]) == 2
    assert "pip install -e '.[data]'" in capsys.readouterr().err
