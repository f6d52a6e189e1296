import random
from pathlib import Path

import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from verl.utils.rouge import mean_rouge_l, rouge_l, tokenize

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat_en_test.parquet"


def by_rouge_score(prediction: str, reference: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)["rougeL"].fmeasure


# ---- English: equal to rouge-score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # 3 of 4 and 4
        ("the gunman police kill", "police killed the gunman", 0.5),  # order counts: 2 of 4 and 4
        ("a b c", "a x b", 2 / 3),
        ("a b", "a b c d", 2 / 3),  # precision 1, recall 1/2
        ("Don't STOP", "don t stop", 1.0),
        ("snake_case 3.14", "snake case 3 14", 1.0),
        ("yes", "no", 0.0),
        ("", "words", 0.0),
        ("words", "...", 0.0),
        ("", "", 0.0),
    ],
)
def test_english_by_hand(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score, abs=1e-12)
    assert by_rouge_score(prediction, reference) == pytest.approx(score, abs=1e-12)


def test_random_english_equals_rouge_score():
    rng = random.Random(0)
    words = [
        "the",
        "The",
        "a",
        "model",
        "model's",
        "x_1",
        "42",
        "4.2",
        "end.",
        "(yes)",
        "--",
        "\n",
        "a-b",
        "t",
        "\t\x0b",
    ]
    scores = []
    for _ in range(300):
        prediction, reference = (" ".join(rng.choices(words, k=rng.randint(0, 40))) for _ in range(2))
        scores.append(rouge_l(prediction, reference))
        assert scores[-1] == pytest.approx(by_rouge_score(prediction, reference), abs=1e-12)
    assert len(set(scores)) > 100  # the cases do differ


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the shared example data is not here")
def test_real_english_pairs_equal_rouge_score():
    table = pd.read_parquet(SHARED_DATA)
    pairs = [
        (baseline, teacher)
        for baseline, teacher in zip(table["baseline_response"], table["teacher_response"], strict=True)
        if baseline.isascii() and teacher.isascii()
    ]
    assert len(pairs) > 20
    for baseline, teacher in pairs:
        assert rouge_l(baseline, teacher) == pytest.approx(by_rouge_score(baseline, teacher), abs=1e-12)


# ---- other scripts


def test_chinese_by_hand():
    # common, in order: 我 喜 欢 猫, 4 of 5 and 5
    assert rouge_l("我很喜欢猫", "我喜欢黑猫") == pytest.approx(0.8)
    assert rouge_l("今天天气好。", "今天，天气好！") == 1.0  # punctuation does not count
    assert rouge_l("你好", "再见") == 0.0
    assert rouge_l("。，！", "你好") == 0.0
    assert by_rouge_score("我很喜欢猫", "我喜欢黑猫") == 0.0  # why this module is not rouge-score


def test_mixed_text_by_hand():
    assert tokenize("用GPT4模型, ok?") == ["用", "gpt4", "模", "型", "ok"]
    # common: 用 gpt4 型; 4 and 5 tokens
    assert rouge_l("用GPT4典型", "用 gpt4 模型 ok") == pytest.approx(2 * 3 / 9)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("東京へ行くカード", ["東", "京", "へ", "行", "く", "カ", "ー", "ド"]),
        ("人々、〇・ア", ["人", "々", "〇", "ア"]),
        ("한국어 ok", ["한", "국", "어", "ok"]),
        ("ｱｲｶﾞ｡", ["ｱ", "ｲ", "ｶ", "ﾞ"]),
        ("a𠮷𪚥b㐀豈", ["a", "𠮷", "𪚥", "b", "㐀", "豈"]),
        ("\U00030000x", ["\U00030000", "x"]),
        ("Привет, мир_да", ["привет", "мир", "да"]),
        ("Café naïve", ["café", "naïve"]),
        ("「」『』（）…—～", []),
        ("🙂 ok", ["ok"]),
    ],
)
def test_tokens_of_other_scripts(text, tokens):
    assert tokenize(text) == tokens


# ---- means


def test_mean():
    assert mean_rouge_l(["a b", "x"], ["a b", "y"]) == 0.5
    with pytest.raises(ValueError, match=r"\(2\).*\(1\)"):
        mean_rouge_l(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"\(0\)"):
        mean_rouge_l([], [])
