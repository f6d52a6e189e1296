"""Settings with their comments, as they stand in the YAML files of `verl/trainer/config`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

COMMENT = re.compile(r"^\s*#\s?(.*)$")


class Entry(NamedTuple):
    """A key of a file: its path from the file's top, the text of its value (None: it holds further keys) and what is
    said of it, in the lines above and behind it."""

    path: tuple[str, ...]
    value: str | None
    comment: str


def entries(file: Path) -> list[Entry]:
    """All keys of a file in their order, groups before what they hold."""
    text = file.read_text(encoding="utf-8")
    return list(_walk(yaml.compose(text, Loader=yaml.SafeLoader), text.splitlines(), ()))


def heading(file: Path) -> str:
    """What the first lines of a file say of the whole."""
    lines = file.read_text(encoding="utf-8").splitlines()
    said = []
    for line in lines:
        found = COMMENT.match(line)
        if found is None:
            break
        if not found[1].startswith("@"):
            said.append(found[1])
    return " ".join(said)


def _walk(node: yaml.MappingNode, lines: list[str], above: tuple[str, ...]) -> Iterator[Entry]:
    for key, value in node.value:
        path, first = (*above, key.value), key.start_mark.line
        nested = isinstance(value, yaml.MappingNode) and not value.flow_style and value.value
        row, column = (first, key.end_mark.column) if nested else (value.end_mark.line, value.end_mark.column)
        behind = re.search(r"(?:^|\s)#\s?(.*)$", lines[row][column:])
        said = [*_above(lines, first), *([behind[1]] if behind else [])]
        source = None if nested else lines[row][value.start_mark.column : column]
        yield Entry(path, source, " ".join(said))
        if nested:
            yield from _walk(value, lines, path)


def _above(lines: list[str], row: int) -> list[str]:
    """The comment that ends in the line before, unless it is the file's own, which begins in the first line."""
    start = row
    while start > 0 and COMMENT.match(lines[start - 1]):
        start -= 1
    return [] if start == 0 else [COMMENT.match(line)[1] for line in lines[start:row]]
