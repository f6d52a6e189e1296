"""Rows into train, validation and judge sets of which none has seen the others' prompts.

    python -m verl.data_tools.split teacher.parquet --out data --validation 0.05 --judge 300

Rows whose prompts are equal but for case, white space and Unicode's compatible forms, or near-duplicates, are a group
and stay together; what near-duplicates are says `near.py`, and what is near to something near is in the group too.
System messages do not count, as many prompts have the same one.

Left out: prompts that mean the same in other words.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.data_tools.command_line import Outcome, require, run_tool, tool_parser
from verl.data_tools.near import NearTexts, frame_of, normalise
from verl.data_tools.writing import check_columns, check_target, write_rows
from verl.tools.flags import number, share, whole
from verl.utils.console import shorten

# The trainer's scripts look for train.parquet and test.parquet in DATA_DIR.
NAMES = {"train": "train", "validation": "test", "judge": "judge"}
EPILOG = """\
example: %(prog)s data/teacher.parquet --out data --validation 0.05 --judge 300 --stratify lang
writes:  data/train.parquet, data/test.parquet (the trainer's name for validation), data/judge.parquet
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tool_parser(
        "split",
        "FILE [FILE ...] --out DIR",
        "Rows into train, validation and judge sets without a common prompt.",
        EPILOG,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".parquet, .jsonl, or a dataset's folder")
    add("--out", required=True, metavar="DIR", help="where the sets go")
    add("--validation", type=_size, default="0.05", metavar="SIZE", help="rows, or a share below 1 (0.05)")
    add("--judge", type=_size, default="0", metavar="SIZE", help="rows, or a share; 0 for none (0)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the draw (0)")
    add("--stratify", metavar="COLUMN", help="each of its values gets its share in every set")
    add("--threshold", type=share(0.1), default=0.8, metavar="X", help="from which prompts are near-duplicates (0.8)")
    add("--prompt_key", default="content", metavar="KEY", help="column of prompts (content)")
    add("--format", choices=("parquet", "jsonl"), default="parquet", help="of the sets (parquet)")
    add("--overwrite", action="store_true", help="replace sets that are there")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's settings."""
    return build_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_tool(lambda options: Outcome(run(options)), parse(argv))


def run(options: argparse.Namespace) -> str:
    """Split and write; returns what to say.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    targets = {name: Path(options.out).expanduser() / f"{file}.{options.format}" for name, file in NAMES.items()}
    for path in targets.values():
        check_target("--out", path, options.overwrite, options.files)
    records, texts = _read(options.files, options.prompt_key)
    check_columns(targets["train"], records)
    strata = _strata(records, options.stratify)
    sizes = {name: _rows(f"--{name}", getattr(options, name), len(records)) for name in ("judge", "validation")}
    groups = find_groups([normalise(text) for text in texts], options.threshold)
    sides = assign(groups, strata, sizes, options.seed)
    _check_sides(sides, sizes, groups)
    of_prompt = dict(zip(map(normalise, texts), groups, strict=True))
    with _replaced(targets) as new:
        for name in dict.fromkeys(sides):
            write_rows(new[name], [record for record, side in zip(records, sides, strict=True) if side == name])
        prove({name: new[name] for name in targets if name in sides}, of_prompt, len(records), options.prompt_key)
    written = {name: path for name, path in targets.items() if name in sides}
    return report(written, sides, sizes, groups, strata if options.stratify else [], texts)


@contextmanager
def _replaced(targets: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """Paths to write to, which take the names of the targets when the block has ended well. Old sets all go before the
    first new one comes, so that a killed run leaves no two that share prompts."""
    new = {name: path.with_name(f"{path.stem}.new{path.suffix}") for name, path in targets.items()}
    try:
        yield new
        for path in targets.values():
            path.unlink(missing_ok=True)
        for name, path in new.items():
            if path.exists():
                path.replace(targets[name])
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def _read(files: Sequence[str], key: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and the text by which each prompt is compared."""
    from verl.data_tools.reading import read_sources
    from verl.utils.dataset.faults import fault_of_columns, fault_of_messages
    from verl.utils.dataset.rows import refuse

    rows = read_sources(files)
    faults, texts = [], []
    for row in rows:
        value = row.record.get(key)
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        fault = row.unreadable or fault_of_columns(row.record, (key,)) or fault_of_messages(messages, key)
        if fault:
            faults.append(row.unreadable or f"{row.place}: {fault}")
        else:
            texts.append(prompt_text(messages))
    refuse(faults, f"{len(faults)} of {len(rows)} rows have no prompt", "Correct the files or --prompt_key")
    return [row.record for row in rows], texts


def _strata(records: Sequence[dict[str, Any]], column: str | None) -> list[str]:
    if column is None:
        return [""] * len(records)
    without = sum(column not in record for record in records)
    if without:
        raise ValueError(
            f"--stratify: expected a column {column!r} in every row, got {without} of {len(records)} without; name "
            f"another, such as {', '.join(records[0])}"
        )
    return [str(record[column]) for record in records]


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def prompt_text(messages: Sequence[dict[str, str]]) -> str:
    """What of a conversation is compared: all messages but the system's."""
    texts = [message["content"] for message in messages if message["role"] != "system"]
    return "\n".join(texts or [message["content"] for message in messages])


def find_groups(texts: Sequence[str], threshold: float) -> list[int]:
    """The number of each normalised text's group, from 0: equal ones and near-duplicates are in one.

    Raises:
        ValueError: the extra is not installed.
    """
    require("scipy", "scipy", "grouping prompts")
    from scipy.cluster.hierarchy import DisjointSet

    different = list(dict.fromkeys(texts))
    near = NearTexts(threshold, frame_of(different))
    joined = DisjointSet(range(len(different)))
    for index, text in enumerate(tqdm(different, desc="prompts", unit="", disable=None, leave=False, delay=2)):
        sketch = near.sketch(text)
        for other in near.candidates(sketch):
            # Within a group there is nothing to find out, and a large one has many pairs.
            if not joined.connected(index, other) and near.similarity(sketch, other) >= threshold:
                joined.merge(index, other)
        near.add(sketch)
    of_text = {text: joined[index] for index, text in enumerate(different)}
    return [of_text[text] for text in texts]


# ---------------------------------------------------------------------------------------------------------------------
# Sets


def assign(groups: Sequence[int], strata: Sequence[str], sizes: dict[str, int], seed: int) -> list[str]:
    """The set of each row. Groups are drawn at random into those of `sizes` as long as they fit; the others train.

    A group that lies in several strata counts as of the one that most of its rows are in.
    """
    rows = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    of_stratum = defaultdict(list)
    for group, members in rows.items():
        of_stratum[Counter(strata[row] for row in members).most_common(1)[0][0]].append(group)
    counts = {stratum: sum(len(rows[group]) for group in own) for stratum, own in of_stratum.items()}
    room = {name: shares(size, counts) for name, size in sizes.items()}
    sides = ["train"] * len(groups)
    for stratum in sorted(of_stratum):
        order = sorted(of_stratum[stratum])
        random.Random(f"split {seed} {stratum}").shuffle(order)
        for group in order:
            name = next((name for name in sizes if len(rows[group]) <= room[name][stratum]), None)
            if name is not None:
                room[name][stratum] -= len(rows[group])
                for row in rows[group]:
                    sides[row] = name
    return sides


def shares(size: int, counts: dict[str, int]) -> dict[str, int]:
    """`size` over the strata by their counts; what rounding leaves goes to the largest remainders."""
    total = sum(counts.values())
    exact = {stratum: size * count / total for stratum, count in counts.items()}
    given = {stratum: int(share) for stratum, share in exact.items()}
    order = sorted(counts, key=lambda stratum: (given[stratum] - exact[stratum], stratum))
    for stratum in order[: size - sum(given.values())]:
        given[stratum] += 1
    return given


def _rows(flag: str, size: float, total: int) -> int:
    rows = round(size * total) if size < 1 else int(size)
    if rows >= total or (size and not rows):
        raise ValueError(f"{flag}: expected some of {total} rows, got {rows}; pass another size")
    return rows


def _check_sides(sides: Sequence[str], sizes: dict[str, int], groups: Sequence[int]) -> None:
    empty = [name for name in ("train", *sizes) if sizes.get(name, 1) and name not in sides]
    if empty:
        number, largest = len(set(groups)), max(Counter(groups).values())
        raise ValueError(
            f"expected rows in every set, got none in {', '.join(empty)}: {len(groups)} rows are {number} groups, the "
            f"largest of {largest}, which stay together; pass other sizes, or a higher --threshold"
        )


def prove(paths: dict[str, Path], groups: dict[str, int], total: int, key: str) -> None:
    """Read the sets again; RuntimeError unless they have all rows, no prompt and no group is in two of them."""
    seen: dict[int, str] = {}
    rows = 0
    for name, path in paths.items():
        _, texts = _read([str(path)], key)
        rows += len(texts)
        for text in texts:
            group = groups[normalise(text)]
            if seen.setdefault(group, name) != name:
                raise RuntimeError(f"{path} shares a prompt with {paths[seen[group]]}: {shorten(text)}")
    if rows != total:
        raise RuntimeError(f"the sets have {rows} rows, not {total}")


# ---------------------------------------------------------------------------------------------------------------------
# Words


def report(
    paths: dict[str, Path],
    sides: Sequence[str],
    sizes: dict[str, int],
    groups: Sequence[int],
    strata: Sequence[str],
    texts: Sequence[str],
) -> str:
    """What was made of the rows."""
    largest, rows = Counter(groups).most_common(1)[0]
    prompts = list(dict.fromkeys(text for text, group in zip(texts, groups, strict=True) if group == largest))
    lines = [
        f"{len(groups):,} rows are {len(set(groups)):,} groups; the largest has {rows:,} rows with {len(prompts):,} "
        "different prompts, such as"
    ]
    lines += [f"  {shorten(prompt, 100)}" for prompt in prompts[:3]]
    for name, path in paths.items():
        own = [index for index, side in enumerate(sides) if side == name]
        wanted = f" of {sizes[name]:,} wanted" if sizes.get(name, len(own)) != len(own) else ""
        of = ", ".join(f"{s}: {n:,}" for s, n in sorted(Counter(strata[i] for i in own).items())) if strata else ""
        lines.append(f"{name:10} {len(own):9,} rows{wanted}   {path}{f'   ({of})' if of else ''}")
    lines.append("read again: every row is there, and no prompt or near-duplicate is in two of them")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags


def _size(text: str) -> float:
    value = number(0)(text)
    if value >= 1 and (value != int(value) or "." in text):
        raise argparse.ArgumentTypeError(f"expected a share below 1 or a whole number of rows, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
