"""The documents as their parts: headings and blocks of code, found by a Markdown parser."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt


class Block(NamedTuple):
    """A heading (of a level) or a block of code (level 0): where it stands, its text, and a fence's language."""

    file: Path
    line: int
    level: int
    text: str
    language: str = ""


def blocks(file: Path) -> list[Block]:
    """A page's headings and blocks of code in their order, those within lists and quotes too."""
    return blocks_of(file.read_text(encoding="utf-8"), file)


def blocks_of(text: str, file: Path) -> list[Block]:
    """The same of a text that would stand in `file`."""
    tokens = MarkdownIt().enable("table").parse(text)
    found = []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            found.append(Block(file, token.map[0] + 1, int(token.tag[1]), after.content))
        elif token.type in ("code_block", "fence"):
            found.append(Block(file, token.map[0] + 1, 0, token.content, token.info.strip().split(" ")[0]))
    return found
