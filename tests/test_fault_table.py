"""docs/reliability.md names a test for every fault: is it there? And does the Chinese page name the same ones?"""

import ast
import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| [^|]+ \| [^|]+ \| [^|]+ \| `(?P<file>[^`:]+)::(?P<test>\w+)` \|$")


HEADINGS = {"docs": "Faults", "docs/zh": "故障"}


def rows(folder: str = "docs") -> list[re.Match]:
    text = (ROOT / folder / "reliability.md").read_text(encoding="utf-8")
    table = text.split(f"\n## {HEADINGS[folder]}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    found = [ROW.match(line) for line in lines]
    assert None not in found, lines[found.index(None)]
    return found


def test_every_fault_has_a_test_that_is_there():
    assert len(rows()) > 40
    for row in rows():
        file = ROOT / row["file"]
        assert file.is_file(), row[0]
        tests = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert row["test"] in tests, row[0]


def test_the_chinese_table_has_the_same_rows():
    """In the same order: the test, and what the program says, which it says in English."""
    for english, chinese in zip_longest(rows(), rows("docs/zh")):
        assert english and chinese, (english or chinese)[0]
        assert (chinese["file"], chinese["test"]) == (english["file"], english["test"]), chinese[0]
        assert re.findall(r'"[^"]*"', chinese[0]) == re.findall(r'"[^"]*"', english[0]), chinese[0]


@pytest.mark.parametrize("folder", HEADINGS)
def test_no_fault_stands_there_twice(folder):
    faults = [row["fault"] for row in rows(folder)]
    assert sorted(set(faults)) == sorted(faults)
