"""Each comparison on sets made by hand with known shares, and against implementations that are not ours."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tests.tiny import byte_tokenizer, scorer, write_model
from verl.data_tools.compare.classifier import _folds, told_apart
from verl.data_tools.compare.command import main
from verl.data_tools.compare.data import Counts, Side, digest, read_side
from verl.data_tools.compare.gap import measure_gap
from verl.data_tools.compare.loss import compare_losses, load_student, losses
from verl.data_tools.compare.overlap import find_overlap
from verl.data_tools.compare.sizes import compare_sizes
from verl.data_tools.compare.statistics import (
    Finding,
    Interval,
    difference_of_means,
    difference_of_shares,
    holm,
    kolmogorov_smirnov,
    p_of_accuracy,
    share,
)
from verl.data_tools.compare.style import HAS, code_share, compare_styles, sentence_lengths
from verl.data_tools.compare.topics import find_topics
from verl.data_tools.compare.verdict import discriminator_reading, headline, rank
from verl.data_tools.compare.vocabulary import find_unseen
from verl.data_tools.compare.words import shown, terms, units
from verl.data_tools.model import find_tokenization
from verl.data_tools.rows import Columns
from verl.tools.judge.statistics import Estimate

REPOSITORY = Path(__file__).parents[2]
NAMES = ("train", "test")


def side(prompts: list[str], answers: list[str], students: list[str] | None = None, name: str = "x") -> Side:
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    every_key = {digest(prompt) for prompt in prompts}
    return Side(
        name, messages, prompts, answers, students, list(prompts), every_key, Counts(len(prompts), len(prompts), 0)
    )


def sentences(draw: random.Random, words: list[str], count: int, length: int = 12) -> list[str]:
    return [" ".join(draw.choices(words, k=length)) for _ in range(count)]


def write_rows(path: Path, rows: list[tuple[str, str]], **more: list[str]) -> Path:
    lines = []
    for at, (prompt, answer) in enumerate(rows):
        line = {"content": [{"role": "user", "content": prompt}], "teacher_response": answer}
        lines.append(json.dumps(line | {key: values[at] for key, values in more.items()}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- intervals and tests ---


def test_intervals_of_shares_are_those_published():
    """Wilson's of 10 in 100; Newcombe's first example, 56 of 70 against 48 of 80, method 10: .0524 to .3339."""
    assert share(10, 100) == pytest.approx((0.1, 0.0552, 0.1744), abs=5e-5)
    assert difference_of_shares((48, 80), (56, 70)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert share(0, 10).low == 0 and math.isnan(share(0, 0).value)


def test_intervals_of_means_are_scipys():
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 1, 40), draw.normal(0.5, 3, 25)
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    found = difference_of_means(a, b)
    assert found[1:] == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert difference_of_means(np.ones(5), np.full(4, 3.0)) == Interval(2.0, 2.0, 2.0)


def test_the_distance_is_counted_by_hand_and_its_p_is_scipys():
    """Of 1 2 3 4 and 3 4 5 6 half of the first are below 3, and none of the second."""
    assert kolmogorov_smirnov(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6]))[0] == 0.5
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 50, 300), draw.integers(5, 55, 200)
    distance, p = kolmogorov_smirnov(a, b)
    by_hand = max(abs((a <= x).mean() - (b <= x).mean()) for x in range(60))
    assert distance == pytest.approx(by_hand)
    assert p == pytest.approx(stats.ks_2samp(a, b, method="exact").pvalue, abs=0.01)
    sizes = compare_sizes("answers", "tokens", a, b)
    assert (sizes.means, sizes.medians) == ((a.mean(), b.mean()), (np.median(a), np.median(b)))


def test_several_tests_at_once():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_coins_by_hand():
    """60 of 100 right, two rows counted as one: 30 or more of 50 coins."""
    expected = sum(math.comb(50, heads) for heads in range(30, 51)) / 2**50
    assert p_of_accuracy(0.6, 100, math.sqrt(2)) == pytest.approx(expected)
    assert p_of_accuracy(0.5, 100, 1.0) > 0.5


# --- vocabulary ---


def test_unseen_words_by_hand():
    """B has the words a, d and e, four in all: d d e are new."""
    unseen = find_unseen(["a b", "C c"], ["A d", "d e"], seed=0)
    assert (unseen.types, unseen.tokens, unseen.most) == (2 / 3, 3 / 4, ["d", "e"])
    chinese = find_unseen(["红苹果"], ["绿苹果"], seed=0)
    assert (chinese.types, chinese.most) == (1 / 3, ["绿"])


def test_unseen_words_beside_chance():
    draw = random.Random(0)
    words = [f"w{number}" for number in range(400)]
    a, b = sentences(draw, words, 60), sentences(draw, words, 60)
    alike = find_unseen(a, b, seed=0)
    assert alike.by_chance[0] <= alike.tokens <= alike.by_chance[2] and alike.p > 0.05
    new = find_unseen(a, [text + " neu" for text in b], seed=0)
    assert new.p <= 0.01 and new.most[0] == "neu" and new.tokens == pytest.approx(alike.tokens * 12 / 13 + 1 / 13)


# --- topics ---


def test_topics_have_the_shares_that_were_made():
    """80% cooking and 20% code against 20% and 80%."""
    draw = random.Random(0)
    cooking, code = ["oven", "soup", "salt", "bake", "recipe"], ["python", "loop", "array", "function", "compile"]
    a = sentences(draw, cooking, 80, 6) + sentences(draw, code, 20, 6)
    b = sentences(draw, cooking, 40, 6) + sentences(draw, code, 160, 6)
    found = find_topics(a, b, 2, seed=0)
    shares = {words: (t.a.value, t.b.value) for t in found.topics for words in t.words if words in ("soup", "loop")}
    assert shares == {"soup": (0.8, 0.2), "loop": (0.2, 0.8)}
    assert all(topic.differs and abs(topic.difference.value) == pytest.approx(0.6) for topic in found.topics)
    assert found.p == pytest.approx(1 / 2000) and 0.5 < found.distance < 0.6
    again = find_topics(a, b, 2, seed=0)
    assert again == found


def test_topics_of_one_kind_are_alike_and_of_none_are_none():
    draw = random.Random(1)
    words = [f"word{chr(97 + n)}" for n in range(20)]
    alike = find_topics(sentences(draw, words, 100), sentences(draw, words, 100), 4, seed=0)
    assert alike is None or (alike.p > 0.05 and not any(topic.differs for topic in alike.topics))
    assert find_topics(["1 2 3"] * 30, ["4 5"] * 30, 4, seed=0) is None


def test_terms_of_both_languages():
    assert terms("Bake the 3 Soup-pots, a x") == ["bake", "the", "soup", "pots"]
    assert terms("红苹果 ok 好") == ["红苹", "苹果", "ok", "好"]
    assert units("a b") == ["a", " ", "b", "a\0 ", " \0b"]
    assert (shown("a\0 "), shown("  "), shown("\n\0-")) == ("a", "␣␣", "⏎-")


# --- the classifier ---


def test_what_is_alike_is_not_told_apart_and_what_is_not_is():
    draw = random.Random(0)
    words = [f"w{number}" for number in range(50)]
    prompts = [f"p{number}" for number in range(200)]
    halves = sentences(draw, words, 100), sentences(draw, words, 100)
    same = told_apart(side(prompts[:100], []), side(prompts[100:], []), halves, seed=0)
    assert same.accuracy.low <= 0.5 <= same.accuracy.high and same.p > 0.05
    other = sentences(draw, [*words[:40], "new1", "new2", "new3"], 100)
    texts = (sentences(draw, words, 100), [text + " mark" for text in other])
    told = told_apart(side(prompts[:100], []), side(prompts[100:], []), texts, seed=0)
    assert told.accuracy.value > 0.95 and told.p < 1e-9 and told.telling[1][0] == "mark"


def test_the_accuracy_is_the_best_that_there_is():
    """The only difference is a word, in 80% of one side's texts and in 20% of the other's: 80% can be right."""
    draw = random.Random(3)
    texts = []
    for chance in (0.8, 0.2):
        texts.append(["yes it is" if draw.random() < chance else "no not so" for _ in range(600)])
    prompts = [[f"{letter}{number}" for number in range(600)] for letter in "ab"]
    told = told_apart(side(prompts[0], []), side(prompts[1], []), tuple(texts), seed=0)
    best = (sum(t.startswith("yes") for t in texts[0]) + sum(t.startswith("no") for t in texts[1])) / 1200
    assert told.accuracy.value == pytest.approx(best, abs=0.005)


def test_sets_that_are_alike_seldom_look_different():
    """25 random halves of one set: a p below .05 in one or two is expected, the interval holds 1/2 in nearly all."""
    draw = random.Random(5)
    words = [f"w{number}" for number in range(300)]
    below, held = 0, 0
    for trial in range(25):
        texts = sentences(draw, words, 120)
        prompts = [f"p{number}" for number in range(120)]
        told = told_apart(side(prompts[:60], []), side(prompts[60:], []), (texts[:60], texts[60:]), seed=trial)
        below += told.p < 0.05
        held += told.accuracy.low <= 0.5 <= told.accuracy.high
    assert below <= 3 and held >= 22


def test_a_prompt_is_never_trained_on_and_tested():
    labels, prompts = np.repeat([0, 1], 40), np.tile(np.arange(40), 2)
    for chosen, train, test in _folds(labels, prompts, 40, seed=0):
        assert set(prompts[chosen[train]]).isdisjoint(prompts[chosen[test]])
        assert len(train) + len(test) == len(chosen) == 80


def test_texts_with_nothing_in_common_and_without_words():
    prompts = [f"p{number}" for number in range(80)]
    texts = [chr(0x4E00 + number) for number in range(80)]
    told = told_apart(side(prompts[:40], []), side(prompts[40:], []), (texts[:40], texts[40:]), seed=0)
    assert told.p > 0.05 and told.accuracy.value <= 0.6
    assert find_unseen(["?!"] * 20, ["..."] * 20, seed=0).p == 1.0


# --- style and overlap ---


def test_style_by_hand():
    text = (
        "# Plan\n\nSome **bold** words here. And more!\n- one\n2) two\n\n```py\n# x\n- y\n```\n| a | b |\n|---|---|\n"
    )
    assert [name for name, has in HAS.items() if has(text)] == [
        "a heading", "bold text", "a bullet list", "a numbered list", "a table", "a code block", "an exclamation mark",
    ]  # fmt: skip
    code = "```py\n# x\n- y\n```"
    assert code_share(text) == len(code) / len(text) and not HAS["a heading"](code) and not HAS["a bullet list"](code)
    assert not HAS["bold text"]("2 ** 3 ** 4 and a*b") and HAS["punctuation at its end"]('He said: "yes."')
    assert sentence_lengths("One two. Three!\nv1.5 is 4 words\n```\nx = 1\n```") == [2, 1, 5]
    assert sentence_lengths("我很好。你呢？") == [3, 2]
    found = {each.name: each for each in compare_styles(["- a", "b"] * 50, ["b"] * 100)}
    assert (found["a bullet list"].a, found["a bullet list"].b, found["a bullet list"].p < 1e-9) == (0.5, 0.0, True)
    assert found["a heading"].p == 1.0


def test_overlap_by_hand():
    """Of four prompts one is the same, one nearly, two are not there."""
    long = "please write a short story about a dragon who learns to bake bread in a small village near the sea"
    known = [
        "what is the capital of france",
        long,
        "what is Atlantis",
        *(f"filler question number {n} about topic {n}" for n in range(20)),
    ]
    asked = [known[0], long + "side", "what is the Balfour Declaration", "translate good morning into finnish"]
    found = find_overlap(side(known, []), side(asked, []))
    assert (found.same.value, found.near.value, found.examples) == (0.25, 0.5, [(1, 1)])


def test_overlap_is_of_the_whole_files_though_rows_are_drawn(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [(f"Question {number}?", "yes") for number in range(200)])
    drawn = read_side("a", [str(file)], Columns(), None, max_rows=30, seed=0)
    asked = read_side("b", [str(file)], Columns(), None, max_rows=50, seed=1)
    assert (len(drawn), drawn.counts.total, len(drawn.every_key)) == (30, 200, 200)
    assert find_overlap(drawn, asked).same.value == 1.0 and drawn.knows("question 7") and not drawn.knows("question x")


def test_a_prompt_counts_once(tmp_path):
    rows = [(f"Question {number % 40}?", f"answer {number}") for number in range(100)]
    once = read_side("a", [str(write_rows(tmp_path / "a.jsonl", rows))], Columns(), None, max_rows=1000, seed=0)
    assert once.answers == [f"answer {number}" for number in range(40)] and once.counts == (100, 100, 0)


# --- the student's loss ---


def test_losses_are_those_of_a_plain_forward(tmp_path):
    """transformers' own forward of one row at a time, and cross-entropy by torch."""
    folder = write_model(tmp_path / "model")
    tokenization = find_tokenization(str(folder), {}, "text")
    rows = side(["a?", "longer question?", "红?"], ["Yes.", "It is so, and more.", "是的"])
    model = load_student(str(folder), "cpu", "float32", False)
    found = losses(model, tokenization, rows, [0, 1, 2], max_tokens=40, context=None)
    from transformers import AutoModelForCausalLM

    plain, expected = AutoModelForCausalLM.from_pretrained(folder), []
    for messages, answer in zip(rows.messages, rows.answers, strict=True):
        prompt, ids = tokenization.prompts([messages])[0], tokenization.answers([answer])[0]
        logits = plain(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(losses(model, tokenization, rows, [0, 1, 2], max_tokens=40, context=20)) == 2
    with pytest.raises(ValueError, match="context of 3 tokens"):
        losses(model, tokenization, rows, [0], max_tokens=40, context=3)
    compared = compare_losses(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0]))
    assert (compared.a, compared.b, compared.difference.value) == (2.0, 3.0, 1.0)


# --- a discriminator tried out ---


def trial(shifted: bool, learnable: bool) -> tuple[Side, Side]:
    """Teachers that may have a word of their own; in B, shifted, the student has it."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(200)]
    made = []
    for letter in "ab":
        teachers, students = (sentences(draw, words, 240) for _ in range(2))
        marked = students if letter == "b" and shifted else teachers
        if learnable:
            marked[:] = [text + (" indeed" if draw.random() < 0.8 else "") for text in marked]
        made.append(side([f"{letter}{n}" for n in range(240)], teachers, students, letter))
    return made[0], made[1]


def test_a_shift_and_learning_by_heart_are_told_from_each_other():
    by_heart = measure_gap(*trial(shifted=False, learnable=False), seed=0)
    assert by_heart.known_pairs > 0.95 and by_heart.shift.low < 0 < by_heart.shift.high
    assert by_heart.other_prompts.low < 0.5 < by_heart.other_prompts.high and by_heart.known > 0.3
    holds = measure_gap(*trial(shifted=False, learnable=True), seed=0)
    assert holds.other_prompts.low > 0.6 and holds.b.low > 0.6 and holds.shift.low < 0 < holds.shift.high
    shift = measure_gap(*trial(shifted=True, learnable=True), seed=0)
    assert shift.other_prompts.low > 0.6 and shift.b.high < 0.5 and shift.shift.low > 0.3
    a, _ = trial(shifted=False, learnable=True)
    assert measure_gap(a, a, seed=0) is None


# --- the verdict ---


def findings(*effects: tuple[str, float, float]) -> list[Finding]:
    return [Finding(aspect, effect, p, f"says {aspect}") for aspect, effect, p in effects]


def read(found: list[Finding], accuracies: tuple[float, float] | None = None, pairs: int = 400) -> str:
    draw = random.Random(0)
    words = [f"w{number}" for number in range(50)]
    prompts = [f"p{number}" for number in range(60)]
    a, b = side(prompts[:30], []), side(prompts[30:], [])
    test = told_apart(a, b, (sentences(draw, words, 30), sentences(draw, words, 30)), seed=0)
    overlap = find_overlap(a, b)
    return " ".join(discriminator_reading(rank(found), NAMES, [test], overlap, None, accuracies, pairs))


def test_the_headline_has_the_largest_difference_first():
    alike = findings(("lengths of prompts", 0.04, 0.2), ("topics of prompts", 0.02, 0.6))
    assert headline(rank(alike), NAMES).startswith("train and test cannot be told apart: none of 2 comparisons")
    # .03 is .06 among two of what is left; the smallest effect that counts is said last.
    mixed = findings(("x", 0.2, 1e-6), ("y", 0.6, 1e-4), ("z", 0.9, 0.06), ("y: more", 0.5, 1e-4))
    said = headline(rank(mixed), NAMES)
    assert said == "train and test differ very much; most of all, says y; then, says x; and 1 of 4 comparisons more"
    assert headline(rank(findings(("x", 0.05, 1e-6))), NAMES).startswith("train and test differ a little; most of all")


def test_the_users_question_is_answered_as_far_as_data_can():
    """76.8% in training and 45.8% in testing."""
    alike = findings(("words of answers", 0.01, 0.4))
    accuracies = (0.768, 0.458)
    said = read(alike, accuracies)
    assert "speaks for over-fitting on train's prompts and shows no shift" in said and "cannot be ruled out" in said
    # 0.458 +- 0.049 of 400, and +- 0.015 of 4,000.
    assert "40.9% to 50.6%: no more than a coin" in said and "What the data alone cannot say" in said
    assert "below chance. Over-fitting alone ends at 50%" in read(alike, accuracies, pairs=4000)
    assert "above chance; it lost 10.0%" in read(alike, (0.768, 0.668))
    shifted = read(findings(("words of answers", 0.5, 1e-9), ("words of prompts", 0.01, 0.5)))
    assert "supports a shift" in shifted and "neither shows nor rules out" in shifted
    assert "The prompts look alike and the answers do not: another teacher" in shifted
    small = read(findings(("words of prompts", 0.05, 1e-9)))
    assert "differ a little" in small and "speaks for over-fitting" in small
    assert isinstance(Estimate(0, 0, 0, 0, 0), Estimate)


# --- the command ---


def world(path: Path, seed: int, count: int = 80, style: str = "") -> Path:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        english = number % 2
        name = "".join(draw.choices("abcdefgh", k=6))
        prompt = f"What colour is the {name}?" if english else f"{name}是什么颜色？"
        colour = draw.choice(["red", "blue", "green"] if english else ["红", "蓝", "绿"])
        rows.append((prompt, f"{style}It is {colour}." if english else f"{style}是{colour}色的。"))
    return write_rows(path, rows, students=[answer.replace("is", "seems") for _, answer in rows])


def run_of(capsys, *flags: str) -> str:
    main(list(flags))
    return capsys.readouterr().out


def test_the_command_says_what_differs_and_the_same_twice(tmp_path, capsys):
    a, same = world(tmp_path / "a.jsonl", 1), world(tmp_path / "same.jsonl", 2)
    other, model = world(tmp_path / "other.jsonl", 3, style="# Answer\n\n"), write_model(tmp_path / "model")
    out = tmp_path / "out.json"
    flags = ["--a", str(a), "--model", str(model), "--d_acc", "0.768", "0.458"]
    said = run_of(capsys, *flags, "--b", str(same))
    assert said.splitlines()[0].startswith("a and same cannot be told apart: none of")
    assert said == run_of(capsys, *flags, "--b", str(same))
    more = ["--student", str(model), "--student_key", "students", "--json", str(out)]
    said = run_of(capsys, *flags, *more, "--b", str(other), "--names", "训练", "测试")
    assert said.splitlines()[0].startswith("训练 and 测试 differ very much; most of all, ")
    assert "answers with a heading are 0% of 训练 and 100% of 测试" in said and "linear judge of words" in said
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["verdict"] == said.splitlines()[0] and found["told_apart"]["answers"]["accuracy"]["value"] == 1.0
    assert found["difficulty"]["rows"] == [80, 80] and found["trial"]["known_pairs"] > 0.5
    assert {"answers", "prompts"} == set(found["vocabulary"])


def test_set_against_itself(tmp_path, capsys):
    a = world(tmp_path / "a.jsonl", 1)
    said = run_of(capsys, "--a", str(a), "--b", str(a), "--student_key", "students")
    assert (
        said.splitlines()[0].startswith("A and B cannot be told apart") and "prompts of B that A has too: 100" in said
    )
    assert "100.0% of B's prompts are A's too" in said


def strict_model(folder: Path) -> Path:
    """A model whose template takes no system messages."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        + tokenizer.chat_template
    )
    write_model(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--b", "no.jsonl"], "no such data file"),
        (["--b", "{few}"], "expected at least 20 different prompts"),
        (["--b", "{bad}"], r"line 1 (from 1) is not JSON"),
        (["--b", "{good}", "--teacher_key", "x"], "'x'"),
        (["--b", "{good}", "--student_key", "no"], "'no'"),
        (["--b", "{good}", "--model", "{folder}"], "holds no model"),
        (["--b", "{system}", "--model", "{model}"], "1 of 21 rows cannot be used"),
        (["--b", "{good}", "--student", "{critic}"], "discriminator"),
        (["--b", "{good}", "--json", "{json}"], "is there already"),
        (["--b", "{good}", "--device", "tpu"], "expected cpu, cuda"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, capsys, flags, said):
    names = {"good": world(tmp_path / "good.jsonl", 1), "few": world(tmp_path / "few.jsonl", 1, count=10)}
    names |= {"bad": tmp_path / "bad.jsonl", "folder": tmp_path, "json": tmp_path / "x.json"}
    names["bad"].write_text("nonsense\n")
    names["json"].write_text("{}")
    names["model"], names["critic"] = strict_model(tmp_path / "model"), tmp_path / "critic"
    scorer().save_pretrained(names["critic"])
    byte_tokenizer().save_pretrained(names["critic"])
    names["system"] = world(tmp_path / "system.jsonl", 1, count=20)
    with names["system"].open("a") as out:
        content = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        out.write(json.dumps({"content": content, "teacher_response": "z"}) + "\n")
    assert main(["--a", str(names["good"]), *(flag.format(**names) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error


def test_without_the_extra_it_says_which(tmp_path, capsys, monkeypatch):
    a = world(tmp_path / "a.jsonl", 1)
    monkeypatch.setattr("verl.data_tools.command_line.find_spec", lambda name: None)
    assert main(["--a", str(a), "--b", str(a)]) == 2
    assert "pip install -e '.[data]'" in capsys.readouterr().err
