"""The teacher's process and the command, for tests."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-1234567"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}


class Teacher:
    """A running server, and what it has recorded."""

    def __init__(self, url: str, record: Path):
        self.url, self.record = url, record

    def lines(self, kind: str) -> list[dict]:
        """What it wrote of requests that "began", or were "answered"."""
        found = [json.loads(line) for line in self.record.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if kind in line]

    def texts(self, kind: str = "answered") -> list[str]:
        return [line["text"] for line in self.lines(kind)]


@contextmanager
def teaching(folder: Path, **script):
    """A teacher that goes by the script."""
    record = folder / f"record_{len(list(folder.glob('record_*')))}"
    record.touch()
    command = [sys.executable, "-m", "tests.data_tools.teacher_server", str(record), json.dumps(script)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Teacher(process.stdout.readline().strip(), record)
        finally:
            process.kill()


def command(prompts: Path, out: Path, url: str, *flags: str) -> list[str]:
    """Arguments of collect."""
    return [str(prompts), "--out", str(out), "--endpoint", url, "--model", "teacher", *flags]


def start(arguments: list[str], **options) -> subprocess.Popen:
    """Collect in a process of its own, which hears SIGINT also where these tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "verl.data_tools.collect", *arguments],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def write_prompts(path: Path, count: int) -> Path:
    """Different prompts in English and Chinese, one a line."""
    path.write_text("".join(f"What is number {i}? 第{i}个问题\n" for i in range(count)), encoding="utf-8")
    return path


def rows_of(path):
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else read_lines(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def files_with_the_key(folder: Path) -> list[Path]:
    """Of all that was written, but for the teacher's own record."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("record_")]
    return [path for path in files if KEY.encode() in path.read_bytes()]
