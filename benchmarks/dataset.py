"""Reading a training file when a run starts: seconds and memory of the first start and of the next.

    python -m benchmarks.dataset --rows 1000000 --tokenizer FOLDER --out dataset.json

Short chat rows are made up, about 300 bytes each. Every start is a process of its own that does what a run does with
its training file: every row is looked at, so that bad data ends it now, and prompts and answers are counted in tokens.
`seconds` is that alone, without imports, and `cpu` the seconds of all processors in it; `seconds_100` takes 100 batches
of 32 rows, shuffled. `rss` is the most memory that the process has had, above what it had before, and `own` what of it
is its own in the end: the rest are pages of mapped files, which the system takes back when it needs them. `first` finds
an empty cache, `next` what `first` has left there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from torch.utils.data import DataLoader

from benchmarks.common import Report, parser, say
from benchmarks.inputs import word_tokenizer
from benchmarks.shapes import SHAPES
from verl.models.tokenizer import load_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.dataset.sampler import EpochBatches

COLUMNS = ("start", "rows", "gb", "seconds", "cpu", "seconds_100", "rss_mib", "own_mib", "cache_gb")
WORDS = re.findall(r"\w+", __doc__)
CHARACTERS = "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.set_defaults(device="cpu", shape="tiny")
    result.add_argument("--rows", type=int, default=1_000_000)
    result.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    result.add_argument("--tokenizer", type=Path, help="a model's folder (default: words of the shape's vocabulary)")
    result.add_argument("--processes", type=int, default=1, help="data.filter_overlong_prompts_workers")
    result.add_argument("--starts", nargs="+", choices=["first", "next"], default=["first", "next"])
    result.add_argument("--start", nargs=2, metavar=("FILE", "TOKENIZER"), help=argparse.SUPPRESS)
    return result


def write_rows(path: Path, rows: int) -> None:
    """Questions and answers of made-up words, every seventh in Chinese."""
    source = random.Random(0)

    def text(shortest: int, longest: int, chinese: bool) -> str:
        parts = source.choices(CHARACTERS if chinese else WORDS, k=source.randint(shortest, longest))
        return "".join(parts) if chinese else " ".join(parts)

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            question, answer = (text(*lengths, number % 7 == 0) for lengths in ((4, 20), (10, 45)))
            content = [{"role": "user", "content": f"{number} {question}"}]
            row = {"content": content, "teacher_response": answer, "extra_info": {"number": number}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def as_parquet(lines: Path) -> Path:
    """The same rows as a parquet file."""
    import pyarrow.json
    import pyarrow.parquet

    path = lines.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.json.read_json(lines), path)
    return path


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def start(file: str, tokenizer: str, processes: int) -> None:
    """What a start does with its training file; prints the measures as JSON."""
    logging.basicConfig(level=logging.WARNING)
    settings = SimpleNamespace(
        prompt_key="content", response_key="teacher_response", max_prompt_length=512, max_response_length=512,
        truncation="error", filter_overlong_prompts=False, filter_overlong_prompts_workers=processes,
        on_bad_row="error", return_raw_chat=False, apply_chat_template_kwargs={},
    )  # fmt: skip
    loaded = load_tokenizer(tokenizer)
    rss, own, begin, worked = memory("VmHWM"), memory("RssAnon"), time.perf_counter(), sum(os.times()[:4])
    dataset = RLHFDataset(file, loaded, settings)
    seconds, cpu = time.perf_counter() - begin, sum(os.times()[:4]) - worked
    begin = time.perf_counter()
    batches = EpochBatches(len(dataset), 32, 100, seed=1)
    for _ in DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn):
        pass
    measures = {"seconds": seconds, "cpu": cpu, "seconds_100": time.perf_counter() - begin}
    print(json.dumps({**measures, "rss_mib": memory("VmHWM") - rss, "own_mib": memory("RssAnon") - own}))


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; returns what `--out` has."""
    args = arguments().parse_args(argv)
    if args.start:
        start(*args.start, args.processes)
        return {}
    report = Report("dataset", args, COLUMNS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"writing {args.rows} rows")
        file = folder / "rows.jsonl"
        write_rows(file, args.rows)
        file = as_parquet(file) if args.kind == "parquet" else file
        if args.tokenizer is None:
            word_tokenizer(SHAPES[args.shape].vocab).save_pretrained(folder / "tokenizer")
        tokenizer = args.tokenizer or folder / "tokenizer"
        cache = folder / "cache"
        cache.mkdir()
        for name in args.starts:
            command = [sys.executable, "-m", "benchmarks.dataset", "--processes", str(args.processes)]
            command += ["--start", str(file), str(tokenizer)]
            environment = os.environ | {"VERL_CACHE_DIR": str(cache)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            measures = json.loads(done.stdout.splitlines()[-1])
            size = sum(kept.stat().st_size for kept in cache.iterdir())
            report.add(start=name, rows=args.rows, gb=file.stat().st_size / 1e9, cache_gb=size / 1e9, **measures)
    return report.finish()


if __name__ == "__main__":
    main()
