"""Small expressions over a run's metrics and settings, for rules: `median('critic/d_acc') - last('val/critic/d_acc')`.

The syntax is a part of Python's; nothing is given to Python to run. A tree of numbers, comparisons and calls of the
functions below is walked, and everything else is refused when the expression is read. An expression ends in a time that
its length and the longest window bound: there are no loops, powers or attributes.

What cannot be said yet, because a metric or a setting is missing, too few steps have been made or a number is divided
by zero, is Unknown: the rule is silent then.
"""

from __future__ import annotations

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from verl.monitor.series import Series

LONGEST_WINDOW = 1000
LONGEST_TEXT = 1000
DEEPEST = 30
LARGEST = 1e300


class ExpressionFault(ValueError):
    """A text that is no expression; the message says what was expected, what is there, and how to mend it."""


class Unknown(Exception):
    """There is no value yet. `reason` names a sentence, `unknown_...` in texts.yaml, which is filled with `facts`."""

    def __init__(self, reason: str, **facts: Any):
        super().__init__(reason, facts)
        self.reason, self.facts = reason, facts


@dataclass
class Facts:
    """What expressions are about: metrics so far, the run's settings (nested), the present step, a rule's window."""

    metrics: Mapping[str, Series]
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    window: int = 10

    def series(self, name: str) -> Series:
        if name not in self.metrics:
            raise Unknown("not_logged", name=name)
        return self.metrics[name]

    def latest(self, name: str, count: int | None, whole: bool = True) -> list[float]:
        """The last `count` finite values (the rule's window when None), oldest first. Unknown for fewer, unless `whole`
        is false and there is one."""
        count = self.window if count is None else count
        values = list(islice(filter(math.isfinite, reversed(self.series(name).values)), count))
        if len(values) < (count if whole else 1):
            raise Unknown("too_few", name=name, have=len(values), count=count)
        return values[::-1]


def _median(facts: Facts, name: str, count: int | None = None) -> float:
    return statistics.median(facts.latest(name, count))


def _mean(facts: Facts, name: str, count: int | None = None) -> float:
    return statistics.fmean(facts.latest(name, count))


def _least(facts: Facts, name: str, count: int | None = None) -> float:
    return min(facts.latest(name, count, whole=False))


def _most(facts: Facts, name: str, count: int | None = None) -> float:
    return max(facts.latest(name, count, whole=False))


def _total(facts: Facts, name: str, count: int | None = None) -> float:
    return math.fsum(facts.latest(name, count, whole=False))


def _last(facts: Facts, name: str) -> float:
    return facts.latest(name, 1)[0]


def _first(facts: Facts, name: str, count: int | None = None) -> float:
    count = facts.window if count is None else count
    values = list(islice(filter(math.isfinite, facts.series(name).values), count))
    if len(values) < count:
        raise Unknown("too_few", name=name, have=len(values), count=count)
    return statistics.median(values)


def _rise(facts: Facts, name: str, count: int | None = None) -> float:
    values = facts.latest(name, count)
    half = max(1, len(values) // 2)
    return statistics.median(values[-half:]) - statistics.median(values[:half])


def _broken(facts: Facts, *names: str) -> float:
    there = [facts.metrics[name].values[-facts.window :] for name in names if name in facts.metrics]
    if not there:
        raise Unknown("none_logged", names=", ".join(names))
    return max(sum(not math.isfinite(value) for value in values) / len(values) for values in there)


def _has(facts: Facts, name: str) -> bool:
    return name in facts.metrics


def _count(facts: Facts, name: str) -> int:
    return len(facts.metrics[name].values) if name in facts.metrics else 0


def _age(facts: Facts, name: str) -> int:
    return facts.step - facts.series(name).steps[-1]


def look_up(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or of the same key written flat; KeyError where there is none."""
    if key in settings:
        return settings[key]
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[part]
    return value


def _setting(facts: Facts, key: str, *otherwise: Any) -> Any:
    try:
        return look_up(facts.settings, key)
    except KeyError:
        if otherwise:
            return otherwise[0]
        raise Unknown("no_setting", key=key) from None


@dataclass(frozen=True)
class Function:
    """What a name in an expression does: `call(facts, *arguments)`. `takes` has a letter per argument: m a metric's
    name, n a window, k a setting's key, x any value; capital: may be left out; + behind it: any number of them."""

    call: Callable[..., Any]
    takes: str
    usage: str


FUNCTIONS = {
    "median": Function(_median, "mN", "median('METRIC'[, N]): of its last N values (default: the rule's window)"),
    "mean": Function(_mean, "mN", "mean('METRIC'[, N])"),
    "rise": Function(_rise, "mN", "rise('METRIC'[, N]): median of the later half of the last N less that of the other"),
    "least": Function(_least, "mN", "least('METRIC'[, N]): of the last N values, or as many as there are"),
    "most": Function(_most, "mN", "most('METRIC'[, N])"),
    "total": Function(_total, "mN", "total('METRIC'[, N]): sum of the last N values, or as many as there are"),
    "last": Function(_last, "m", "last('METRIC')"),
    "first": Function(_first, "mN", "first('METRIC'[, N]): median of the run's first N values"),
    "broken": Function(_broken, "m+", "broken('METRIC', ...): largest share of the window that is nan or infinite"),
    "has": Function(_has, "m", "has('METRIC'): whether it was ever logged"),
    "count": Function(_count, "m", "count('METRIC'): values so far, 0 if it was never logged"),
    "age": Function(_age, "m", "age('METRIC'): steps since its last value"),
    "step": Function(lambda facts: facts.step, "", "step(): the present step"),
    "setting": Function(_setting, "kX", "setting('KEY'[, OTHERWISE]): the run's setting"),
    "abs": Function(lambda facts, x: abs(x), "x", "abs(X)"),
    "max": Function(lambda facts, *xs: max(xs), "x+", "max(X, ...)"),
    "min": Function(lambda facts, *xs: min(xs), "x+", "min(X, ...)"),
}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Expression:
    """A checked expression; call it with Facts. `metrics` are the names it may read, in order.

    Raises:
        ExpressionFault: the text is none.
    """

    def __init__(self, text: str):
        self.text = text
        self.metrics: list[str] = []
        if len(text) > LONGEST_TEXT:
            raise ExpressionFault(f"expected at most {LONGEST_TEXT} characters, got {len(text)}; fix: split the rule")
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self._check(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, ExpressionFault):
                raise
            raise ExpressionFault(
                f"expected an expression such as median('critic/d_acc') - last('val/critic/d_acc'), got {text!r}; "
                "fix: close quotes and brackets, and quote the names of metrics"
            ) from None
        self.tree = tree.body

    def __call__(self, facts: Facts) -> Any:
        """The value: a float, a bool or a setting's value.

        Raises:
            Unknown: there is none yet.
        """
        try:
            return self._value(self.tree, facts)
        except (ZeroDivisionError, OverflowError, TypeError) as error:
            raise Unknown("no_result", text=self.text, error=error) from error

    def _check(self, node: ast.expr, depth: int = 0) -> None:
        """ExpressionFault for a part that does not belong here."""
        if depth > DEEPEST:
            raise ExpressionFault(f"expected at most {DEEPEST} levels of brackets and signs, got more; fix: split it")
        match node:
            case ast.Constant(value=bool() | str()):
                return
            case ast.Constant(value=int() | float() as number) if abs(number) < LARGEST:
                return
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                parts = [node.operand]
            case ast.BinOp(op=operation) if type(operation) in ARITHMETIC:
                parts = [node.left, node.right]
            case ast.BoolOp():
                parts = node.values
            case ast.Compare(ops=operations) if all(type(operation) in COMPARISONS for operation in operations):
                parts = [node.left, *node.comparators]
            case ast.IfExp():
                parts = [node.test, node.body, node.orelse]
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
                return self._check_call(name, node.args, depth)
            case _:
                raise ExpressionFault(
                    f"expected numbers, texts, + - * /, comparisons, and, or, not, if-else and the functions "
                    f"{', '.join(FUNCTIONS)}, got {ast.unparse(node)!r}; fix: write it with these, a metric as "
                    "median('NAME')"
                )
        for part in parts:
            self._check(part, depth + 1)

    def _check_call(self, name: str, arguments: list[ast.expr], depth: int) -> None:
        function = FUNCTIONS[name]
        kinds = function.takes
        if kinds.endswith("+"):
            kinds = kinds[0] * max(1, len(arguments))
        needed = sum(kind.islower() for kind in kinds)
        fits = needed <= len(arguments) <= len(kinds)
        for kind, argument in zip(kinds.lower(), arguments, strict=False):
            value = argument.value if isinstance(argument, ast.Constant) else None
            if kind in "mk":
                fits = fits and isinstance(value, str) and bool(value)
            elif kind == "n":
                fits = fits and type(value) is int and 1 <= value <= LONGEST_WINDOW
            else:
                self._check(argument, depth + 1)
            if kind == "m" and isinstance(value, str) and value not in self.metrics:
                self.metrics.append(value)
        if not fits:
            got = f"{name}({', '.join(map(ast.unparse, arguments))})"
            raise ExpressionFault(
                f"expected {function.usage}, got {got}; fix: quote metrics and keys, and take windows of 1 to "
                f"{LONGEST_WINDOW}"
            )

    def _value(self, node: ast.expr, facts: Facts) -> Any:
        match node:
            case ast.Constant(value=value):
                # Floats alone: whole numbers of Python's have no largest one, and would cost any time.
                return float(value) if type(value) is int else value
            case ast.UnaryOp(op=ast.Not()):
                return not self._value(node.operand, facts)
            case ast.UnaryOp():
                return -self._value(node.operand, facts)
            case ast.BinOp():
                left, right = self._value(node.left, facts), self._value(node.right, facts)
                return ARITHMETIC[type(node.op)](_number(left), _number(right))
            case ast.BoolOp(op=ast.And()):
                return all(self._value(part, facts) for part in node.values)
            case ast.BoolOp():
                return any(self._value(part, facts) for part in node.values)
            case ast.IfExp():
                return self._value(node.body if self._value(node.test, facts) else node.orelse, facts)
            case ast.Compare():
                return self._compare(node, facts)
            case ast.Call():
                return self._call(node, facts)
        raise TypeError(f"unchecked: {ast.unparse(node)}")

    def _compare(self, node: ast.Compare, facts: Facts) -> bool:
        values = [self._value(part, facts) for part in (node.left, *node.comparators)]
        return all(
            COMPARISONS[type(operation)](left, right)
            for operation, left, right in zip(node.ops, values, values[1:], strict=False)
        )

    def _call(self, node: ast.Call, facts: Facts) -> Any:
        function = FUNCTIONS[node.func.id]
        kinds = function.takes.lower()
        kinds = kinds[0] * len(node.args) if kinds.endswith("+") else kinds
        values = [
            self._value(argument, facts) if kind == "x" else argument.value
            for kind, argument in zip(kinds, node.args, strict=False)
        ]
        return function.call(facts, *values)


def _number(value: Any) -> float:
    """TypeError for a text: some operators would take it and grow it."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value
