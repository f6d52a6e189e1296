"""Plain numbers and intervals, worked out by hand or against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from verl.tools.judge.numbers import distinct_ngrams, in_loop, numbers_of, repeated_share
from verl.tools.judge.statistics import CROSS_VALIDATED, clustered_mean, paired_difference, t_quantile


def test_repeated_sequences_by_hand():
    # 10 words have 3 sequences of 8. Ten equal words: one sequence three times, two of them seen before.
    assert repeated_share("no " * 10) == pytest.approx(2 / 3)
    assert repeated_share("a b c d e f g h i j") == 0
    # abab...: two different ones among the 5 of 12 words.
    assert repeated_share("a b " * 6) == pytest.approx(3 / 5)
    # Fewer than 8 words have none; case and punctuation do not count.
    assert repeated_share("no no no no no no no") == repeated_share("") == 0
    assert repeated_share("No, no! NO no; no no no no no no.") == pytest.approx(2 / 3)


def test_chinese_is_counted_by_characters():
    assert repeated_share("天" * 10) == pytest.approx(2 / 3)
    assert repeated_share("一二三四五六七八九十") == 0


def test_loops_begin_beyond_thirty_percent():
    once = "a b c d e f g h"
    assert not in_loop(f"{once} then something else {once}")  # 1 of 12 sequences
    assert in_loop(f"{once} {once} {once}")  # 9 of 17
    # 10 sequences with 3 repeated are exactly 30%, with 7 different ones: a period of 7 words, 17 words long.
    period = ["a", "b", "c", "d", "e", "f", "g"]
    assert repeated_share(" ".join((period * 3)[:17])) == pytest.approx(0.3)
    assert not in_loop(" ".join((period * 3)[:17]))
    assert in_loop(" ".join((period * 3)[:18]))  # 4 of 11


def test_distinct_ngrams_by_hand():
    texts = ["the cat the cat", "the dog"]
    assert distinct_ngrams(texts, 1) == pytest.approx(3 / 6)
    assert distinct_ngrams(texts, 2) == pytest.approx(3 / 4)  # the cat, cat the, the dog
    assert distinct_ngrams(texts, 3) == pytest.approx(2 / 2)
    assert distinct_ngrams(texts, 4) == 1 and distinct_ngrams(["a b"], 4) == 0
    assert distinct_ngrams(["红的红的"], 2) == pytest.approx(2 / 3)


def test_numbers_by_hand():
    numbers = numbers_of(
        texts=[["one two", "one"], ["红的", "no " * 10]],
        lengths=[[3, 2], [5, 10]],
        cut=[[False, False], [False, True]],
        teacher=["one two", "红的"],
        teacher_mean_tokens=4.0,
    )
    assert numbers.answers == 4
    # 1, 2/3 (one of one, one of two), 1, 0
    assert numbers.rouge_l == pytest.approx((1 + 2 / 3 + 1) / 4)
    assert (numbers.mean_tokens, numbers.median_tokens, numbers.length_ratio) == (5.0, 4.0, 1.25)
    assert (numbers.cut, numbers.loops) == (0.25, 0.25)
    # First answers: one two / 红 的, all distinct; second ones: one / no x 10, 2 of 11.
    assert numbers.distinct[0] == pytest.approx((1 + 2 / 11) / 2)


# ---- intervals


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 300])
@pytest.mark.parametrize("p", [0.9, 0.975, 0.995])
def test_t_quantile(degrees, p):
    tolerance = 1e-9 if degrees < 3 else 0.03 if degrees == 3 else 1e-2 if degrees == 4 else 1e-3
    assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=tolerance)


def test_interval_is_that_of_the_prompts_means():
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=(40, 3))
    estimate = clustered_mean(values.flatten(), np.repeat(np.arange(40), 3))
    means = values.mean(1)
    low, high = stats.t.interval(0.95, 39, loc=means.mean(), scale=stats.sem(means))
    assert (estimate.value, estimate.count, estimate.clusters) == (pytest.approx(values.mean()), 120, 40)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_widening_is_of_the_standard_error():
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    plain, wide = (clustered_mean(values, np.arange(60), widening=widening) for widening in (1.0, CROSS_VALIDATED))
    assert wide.value == plain.value
    assert wide.high - wide.low == pytest.approx(math.sqrt(2) * (plain.high - plain.low))


def test_copies_of_a_prompts_value_add_no_certainty():
    values = np.random.default_rng(1).integers(0, 2, 50).astype(float)
    once = clustered_mean(values, np.arange(50))
    thrice = clustered_mean(np.repeat(values, 3), np.repeat(np.arange(50), 3))
    assert (once.low, once.high) == (pytest.approx(thrice.low), pytest.approx(thrice.high))


def test_unequal_prompts_by_hand():
    # Values 1, 1 | 0 | 1: mean 3/4; sums of residuals 1/2, -3/4, 1/4; error sqrt(3/2 * 7/8) / 4.
    estimate = clustered_mean(np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 2, 9]), bounds=None)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(1.5 * 0.875) / 4
    assert (estimate.value, estimate.low) == (0.75, pytest.approx(0.75 - reach))
    assert clustered_mean(np.array([1.0, 1.0, 0.0, 1.0]), np.array([7, 7, 2, 9])).high == 1.0


def test_without_spread_the_interval_is_binomial():
    estimate = clustered_mean(np.ones(20), np.repeat(np.arange(10), 2))
    exact = stats.binomtest(10, 10).proportion_ci(0.95)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, pytest.approx(exact.low), 1.0)
    assert clustered_mean(np.zeros(10), np.arange(10)).high == pytest.approx(1 - exact.low)


def test_no_value_and_one_prompt():
    assert math.isnan(clustered_mean(np.zeros(0), np.zeros(0)).value)
    one = clustered_mean(np.array([1.0, 0.0]), np.array([3, 3]))
    assert (one.value, one.low, one.high) == (0.5, 0.0, 1.0)


def test_paired_difference_is_scipys():
    rng = np.random.default_rng(2)
    first, second = rng.random(30), rng.random(30)
    result = paired_difference((first, np.arange(30)), (second[::-1], np.arange(30)[::-1]))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (result.low, result.high) == (pytest.approx(expected.low, abs=1e-4), pytest.approx(expected.high, abs=1e-4))
