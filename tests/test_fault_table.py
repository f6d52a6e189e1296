"""docs/reliability.md names a test for every fault: is it there?"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| [^|]+ \| [^|]+ \| [^|]+ \| `(?P<file>[^`:]+)::(?P<test>\w+)` \|$")


def rows() -> list[re.Match]:
    table = (ROOT / "docs" / "reliability.md").read_text().split("\n## Faults\n")[1].split("\n## ")[0]
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


def test_no_fault_stands_there_twice():
    faults = [row["fault"] for row in rows()]
    assert sorted(set(faults)) == sorted(faults)
