"""Types of flags, for commands that start quickly: nothing here imports torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def whole(lowest: int) -> Callable[[str], int]:
    """A whole number, `lowest` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
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


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r}')
    return value
