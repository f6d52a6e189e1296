"""What the host takes to lay the rows of a micro-batch end to end, before the device has anything of it to do.

    python -m benchmarks.packing --shape 135m --out results/packing.json
    python -m benchmarks.packing --against ../before

The rows are those of `benchmarks.update`, GSPO's: `n` answers to a prompt, of mixed lengths, as many as have so many
tokens. On one thread, `us` are microseconds for a thousand tokens. With `--against` the packing of another working tree
takes turns with this one's, and `of_other` is this one's median over the other's. The device has no meaning here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import ROOT, Report, parser
from benchmarks.shapes import SHAPES
from benchmarks.update import MIXED, batch_of_tokens
from verl.models.packing import AnswerRows
from verl.workers.actor.dp_actor import update_rows

COLUMNS = ("tree", "tokens", "rows", "seconds", "least", "us", "of_other")
THIS, OTHER = "this", "other"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 131072], help="of a micro-batch")
    result.add_argument("--n", type=int, default=8, help="answers per prompt (default: 8)")
    result.add_argument("--times", type=int, default=15, help="each; medians are told (default: 15)")
    result.add_argument("--against", type=Path, metavar="TREE", help="another working tree, to compare with")
    return result


def packing_of(name: str, tree: Path) -> Callable[[AnswerRows], Any]:
    """A tree's way of packing rows; its other modules are this one's."""
    spec = importlib.util.spec_from_file_location(f"packing_of_{name}", tree / "verl" / "models" / "packing.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def packed(rows: AnswerRows) -> Any:
        return module.pack(module.AnswerRows(rows.prompts, rows.prompt_mask, rows.responses, rows.response_mask))

    return packed


def measure(rows: AnswerRows, ways: dict[str, Callable[[AnswerRows], Any]], times: int) -> dict[str, list[float]]:
    """Seconds of every way, in turn, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + times):
        for name, pack in ways.items():
            start = time.perf_counter()
            pack(rows)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; returns what the JSON file gets."""
    args = arguments().parse_args(argv)
    report = Report("packing", args, COLUMNS)
    trees = ({} if args.against is None else {OTHER: args.against.resolve()}) | {THIS: ROOT}
    ways = {name: packing_of(name, tree) for name, tree in trees.items()}
    torch.set_num_threads(1)
    for tokens in args.tokens:
        batch = batch_of_tokens(SHAPES[args.shape], "gspo", args.n, MIXED, tokens)
        rows = update_rows(batch, sft=False, anchor=False).rows
        measured, real = measure(rows, ways, args.times), sum(rows.lengths())
        for name, values in measured.items():
            middle = median(values)
            more = {"of_other": middle / median(measured[OTHER])} if name == THIS and OTHER in measured else {}
            report.add(
                tree=name, tokens=real, rows=len(rows), seconds=middle, least=min(values), us=1e9 * middle / real,
                all_seconds=values, **more,
            )  # fmt: skip
    return report.finish()


if __name__ == "__main__":
    main()
