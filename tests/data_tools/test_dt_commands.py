"""What the six commands have in common: help, wrong usage, output that nobody reads to its end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verl.data_tools import check, collect, compare, convert, lengths, split

ROOT = Path(__file__).parents[2]
TOOLS = {
    "collect": collect, "convert": convert, "check": check, "split": split, "lengths": lengths, "compare": compare,
}  # fmt: skip
# What a call has to have, but for the files.
REQUIRED = {
    "collect": ["{0}", "--out", "{1}", "--endpoint", "http://127.0.0.1:9", "--model", "m"],
    "convert": ["{0}", "--out", "{1}"],
    "check": ["{0}", "--out", "{1}"],
    "split": ["{0}", "--out", "{2}"],
    "lengths": ["--data", "{0}", "--model", "{0}", "--json", "{1}"],
    "compare": ["--a", "{0}", "--b", "{0}", "--json", "{1}"],
}
HEAVY = {"torch", "transformers", "pandas", "pyarrow", "numpy", "scipy", "sklearn", "datasets", "datasketch", "yaml"}


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_short_and_quick(tool):
    code = (
        f"import sys\nfrom verl.data_tools.{tool} import main\ntry: main(['--help'])\n"
        f"finally: sys.stderr.write(str({HEAVY} & set(sys.modules)))"
    )
    # The clock of this process alone: the machine may be busy.
    measured = f"import resource, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)\n"
    measured += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    done = run("-c", measured)
    text, _, seconds = done.stdout.rstrip().rpartition("\n")
    lines = text.splitlines()
    assert done.stderr == "set()" and float(seconds) < 2
    assert lines[0].startswith(f"usage: python -m verl.data_tools.{tool} ") and len(lines) < 40
    assert max(map(len, lines)) < 120 and "docs/data.md" in text
    example = re.split(r"(?m)^examples?:", text)[1]
    assert f"python -m verl.data_tools.{tool} " in example


@pytest.mark.parametrize("tool", TOOLS)
def test_wrong_usage_and_input_end_with_a_sentence_and_2(tool, tmp_path, capsys):
    main = TOOLS[tool].main
    with pytest.raises(SystemExit) as end:
        main(["--no_such_flag"])
    assert end.value.code == 2 and f"python -m verl.data_tools.{tool}: error: " in capsys.readouterr().err
    names = tmp_path / "none.jsonl", tmp_path / "out.json", tmp_path / "sets"
    if tool in ("collect", "convert", "check"):
        names = names[0], tmp_path / "out.jsonl", names[2]
    assert main([part.format(*names) for part in REQUIRED[tool]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "none.jsonl" in said and len(said.splitlines()) == 1
    assert not any(name.exists() for name in names)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_that_nobody_reads_is_no_error(tool):
    done = run("-c", _UNREAD, "-m", f"verl.data_tools.{tool}", "--help")
    assert (done.returncode, done.stderr) == (0, "")


# Its arguments are a command, whose standard output is closed at once.
_UNREAD = """
import os, subprocess, sys
read, write = os.pipe()
os.close(read)
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], stdout=write).returncode)
"""


def test_a_report_that_nobody_reads_is_no_error(tmp_path):
    row = {"content": [{"role": "user", "content": "one"}], "teacher_response": "1"}
    data, step = tmp_path / "data.jsonl", tmp_path / "metrics.jsonl"
    data.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    step.write_text("".join(json.dumps({"step": n, "data": {"actor/sft_loss": 1.0}}) + "\n" for n in range(3)))
    for expected, command in (
        (0, ["verl.data_tools.check", str(data)]),
        (1, ["verl.data_tools.check", str(data), "--fail_on", "duplicate"]),
        (0, ["verl.data_tools.convert", str(data), "--out", str(tmp_path / "out.parquet")]),
        (0, ["verl.monitor", "--list"]),
    ):
        done = run("-c", _UNREAD, "-m", *command)
        assert (done.returncode, done.stderr) == (expected, ""), command
    assert (tmp_path / "out.parquet").is_file()
