"""Types of flags, for commands that start quickly: nothing here imports torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

# What files of answers end in, and the columns in which a student's answers are looked for.
SUFFIXES = (".parquet", ".jsonl")
ANSWER_KEYS = ("answers", "responses", "response", "answer", "student_response")


def whole(lowest: int) -> Callable[[str], int]:
    """A whole number, `lowest` or more."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lowest}, got {text!r}")
        return int(text)

    return parse


def number(lowest: float) -> Callable[[str], float]:
    """A finite number, `lowest` or more."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number from {lowest:g}, got {text!r}")
        return value

    return parse


def number_between(low: float, high: float) -> Callable[[str], float]:
    """A number above `low` and at most `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"expected a number above {low:g}, at most {high:g}, got {text!r}")
        return value

    return parse


def share(lowest: float) -> Callable[[str], float]:
    """A number from `lowest` to 1."""

    def parse(text: str) -> float:
        value = number(lowest)(text)
        if value > 1:
            raise argparse.ArgumentTypeError(f"expected a number from {lowest:g} to 1, got {text!r}")
        return value

    return parse


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r}')
    return value
