"""The pipeline's flags, and what can be said of them alone. Nothing here imports torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from verl.tools.flags import number, share, whole
from verl.utils.command_line import called_as, wide_formatter

STAGES = ("seqkd", "warmup", "gad", "soda")
DEFAULT_STAGES = ("seqkd",)
NUMBERS, DISCRIMINATORS, AUTO = "numbers", "discriminators", "auto"
EPILOG = """\
example: %(prog)s --model BASE --data data/train.parquet --val data/test.parquet --exp_name first

stages: seqkd alone is the default, because on real text SeqKD did the teaching and no further stage was shown to pay
once the temperature to answer at had been chosen. The judge says whether one pays on your data: the same line with
--stages seqkd,warmup,gad (or seqkd,soda) goes on from the SeqKD that is there.

settings: KEY=VALUE is any setting of the trainer and goes to every stage that has a use for it;
seqkd.KEY=VALUE, warmup.KEY=, gad.KEY= and soda.KEY= go to one stage and win over it.

Ended in any way and started again with the same line, it goes on where it was. exit codes: 0 done; 2 wrong usage, or
a problem that was seen before anything started; 130, 143 told to end (SIGINT, SIGTERM); otherwise that of the stage or
the judge that failed. More: docs/pipeline.md
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog=called_as("verl.pipeline"),
        usage="%(prog)s --model BASE --data TRAIN --val VAL --exp_name NAME [flags] [KEY=VALUE ...]",
        description="Distil a teacher's answers into a student: train, merge, judge, report.",
        epilog=EPILOG,
        formatter_class=wide_formatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="BASE", help="the student to begin with: folder, or a name of the hub")
    add(
        "--data", required=True, action="append", metavar="TRAIN",
        help="prompts with the teacher's answers, to train on: parquet or jsonl; may be repeated",
    )  # fmt: skip
    add(
        "--val", required=True, action="append", metavar="VAL",
        help="others, to validate and judge on; may be repeated",
    )  # fmt: skip
    add("--exp_name", required=True, metavar="NAME", help="of this pipeline")
    add(
        "--reward_model", metavar="PATH",
        help="what the discriminator begins with (default: BASE), or a warmed-up critic",
    )  # fmt: skip
    add("--nnodes", type=whole(1), default=1, metavar="N", help="machines (default: 1; docs/nodes.md)")
    add(
        "--stages", type=_stages, default=DEFAULT_STAGES, metavar="A,B,C",
        help=f"of {', '.join(STAGES)}, in order (default: {','.join(DEFAULT_STAGES)})",
    )  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="everything is written here (default: checkpoints/gad/NAME)")
    add("--dry_run", action="store_true", help="say what would run and every problem that can be seen; start nothing")
    _add_judging(parser)
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings of the trainer")
    return parser


def _add_judging(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no_judge", action="store_true", help="do not judge the students")
    add(
        "--judge_by", choices=(AUTO, DISCRIMINATORS, NUMBERS), default=AUTO,
        help="fresh discriminators beside the plain numbers, or these alone (default: discriminators on a GPU, with a "
        "BASE of 100M parameters or more)",
    )  # fmt: skip
    add(
        "--judge_temperatures", type=_temperatures, default=(0.8, 1.0), metavar="T,T",
        help="that students answer at; the first alone where only plain numbers judge (default: 0.8,1)",
    )  # fmt: skip
    add(
        "--judge_memory", type=share(0.01), default=0.8, metavar="X",
        help="vLLM's share of the device while the students answer (default: 0.8)",
    )  # fmt: skip
    add(
        "--judge_seeds", type=whole(1), default=1, metavar="N",
        help="how often each prompt is judged, each time by another discriminator (default: 1)",
    )  # fmt: skip


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of a command line; `out` is absolute."""
    options = build_parser().parse_intermixed_args(arguments)
    out = options.out if options.out is not None else Path("checkpoints") / "gad" / options.exp_name
    options.out = out.expanduser().absolute()
    return options


def _stages(text: str) -> tuple[str, ...]:
    stages = tuple(part.strip() for part in text.split(",") if part.strip())
    problem = problem_of(stages)
    if problem:
        raise argparse.ArgumentTypeError(f"{problem}, got {text!r}")
    return stages


def problem_of(stages: tuple[str, ...]) -> str | None:
    """What is wrong with an order of stages; None if it can be run."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        return f"expected stages of {', '.join(STAGES)}, with commas between them"
    if len(set(stages)) < len(stages):
        return "expected each stage once"
    if "soda" in stages and {"warmup", "gad"} & set(stages):
        return (
            "expected SODA or warmup and GAD, in whose place it is: give SODA a pipeline of its own that begins with "
            "the SeqKD's student (--model OUT/students/seqkd --stages soda)"
        )
    if list(stages) != sorted(stages, key=STAGES.index):
        return f"expected this order: {', '.join(STAGES)}"
    return None


def _temperatures(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(number(0.0)(part.strip()) for part in text.split(",")))
