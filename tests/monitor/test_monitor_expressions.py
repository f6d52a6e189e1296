"""Expressions: what they give, by hand, and that nothing else gets in."""

from __future__ import annotations

import math
import time

import pytest

from verl.monitor.expressions import Expression, ExpressionFault, Facts, Unknown
from verl.monitor.series import Series


def facts(window=4, step=9, settings=None, **metrics):
    series = {name: Series(list(range(len(values))), [float(v) for v in values]) for name, values in metrics.items()}
    return Facts(series, settings or {}, step, window)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("median('a')", 5.5),  # of 4, 5, 6, 100
        ("median('a', 3)", 6),
        ("mean('a', 2)", 53),
        ("least('a')", 4),
        ("most('a', 100)", 100),
        ("total('a', 2)", 106),
        ("last('a')", 100),
        ("first('a', 3)", 2),
        ("rise('a')", 53 - 4.5),
        ("count('a') + count('none')", 7),
        ("age('a')", 3),
        ("step()", 9),
        ("median('n', 2)", 1.5),  # what is not finite does not count
        ("broken('n')", 0.5),
        ("broken('a', 'n', 'none')", 0.5),
        ("has('a') and not has('none')", True),
        ("median('none') if has('none') else -1", -1),
        ("1 < last('a') <= 100", True),
        ("abs(-2) * max(1, 2, 3) / min(4, 2) - 1", 2),
        ("setting('critic.optim.lr')", 1e-6),
        ("setting('flat.key')", 7),
        ("setting('x.y', 'no') == 'no' or last('none') > 0", True),
    ],
)
def test_values(text, value):
    settings = {"critic": {"optim": {"lr": 1e-6}}, "flat.key": 7}
    found = Expression(text)(facts(settings=settings, a=[1, 2, 3, 4, 5, 6, 100], n=[1, 2, math.nan, math.inf]))
    assert found == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "median('a', 8)",
        "median('none')",
        "1 / (last('a') - 1)",
        "setting('x')",
        "setting('text') * 3",
        "setting('text') < 3",
        "last('empty')",
        "1e299 / 0",
    ],
)
def test_what_cannot_be_said_is_unknown(text):
    with pytest.raises(Unknown):
        Expression(text)(facts(settings={"text": "abc"}, a=[1], empty=[math.nan]))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "median.__globals__",
        "(lambda: 1)()",
        "[x for x in 'ab']",
        "open('/etc/passwd')",
        "f'{1}'",
        "2 ** 9",
        "'a' % 1",
        "1 << 9",
        "(x := 1)",
        "{'a': 1}",
        "a",
        "median('a'); 1",
        "median(*['a'])",
        "median(name='a')",
        "median('a', 0)",
        "median('a', 1001)",
        "median('a', True)",
        "median('a', 2.5)",
        "median(1)",
        "median('')",
        "median()",
        "has('a', 'b')",
        "step(1)",
        "median('critic/d_acc)",
        "critic/d_acc",
        "",
        "b'bytes'",
        "None",
        "1j",
        "-" * 100 + "1",
        "(" * 300 + "1" + ")" * 300,
        "1+" * 600 + "1",
        "9" * 990,
        "median('a') is 1",
    ],
)
def test_everything_else_is_refused_with_a_way_out(text):
    with pytest.raises(ExpressionFault) as error:
        Expression(text)(facts(a=[1]))
    assert all(word in str(error.value) for word in ("expected", "got", "fix"))


def test_an_expression_ends_soon():
    """Texts do not grow and whole numbers are floats, so that no expression that fits costs more than it is long."""
    product = Expression(" * ".join(["999999999"] * 25))
    start = time.perf_counter()
    assert product(facts()) == pytest.approx(999999999.0**25)
    with pytest.raises(Unknown):
        Expression("'a' * 999999999")(facts())
    assert time.perf_counter() - start < 0.1


def test_the_metrics_that_are_read():
    found = Expression("median('a') - last('b') if has('c') else setting('d', 'e')")
    assert found.metrics == ["c", "a", "b"]
