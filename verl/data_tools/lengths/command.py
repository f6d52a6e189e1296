"""The command: flags in, report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from verl.data_tools.command_line import (
    Outcome,
    add_text_flags,
    add_training_flags,
    require,
    run_tool,
    tool_parser,
)
from verl.data_tools.writing import check_target, write_report
from verl.tools.flags import number_between, whole

if TYPE_CHECKING:
    from verl.data_tools.lengths.advice import Advice
    from verl.data_tools.lengths.limits import Limits
    from verl.data_tools.lengths.measure import Lengths

DESCRIPTION = "How long prompts and answers are in a model's tokens, and the settings that fit them."
EPILOG = """\
example:
  %(prog)s --data data/train.parquet --model BASE --gpus 8 --gpu_memory 80 --chart lengths.png

For each stage script: the settings to paste behind it, which have passed the trainer's own checks, each with a reason.
"""
STAGES = ("seqkd", "warmup", "gad", "soda")


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = tool_parser("lengths", "--data FILE ... --model FOLDER", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="FILE", help="parquet or jsonl, as data.train_files")
    add("--val_files", nargs="+", default=[], metavar="FILE", help="as data.val_files: their prompts have to fit too")
    add("--model", required=True, metavar="FOLDER", help="the student to train, or its tokenizer alone")
    add(
        "--stage",
        choices=STAGES,
        nargs="+",
        default=["seqkd", "warmup", "gad"],
        metavar="NAME",
        help=f"of {', '.join(STAGES)} (seqkd warmup gad)",
    )
    add("--keep", type=number_between(0, 1), default=0.99, metavar="X", help="share to keep whole (0.99)")
    add("--gpus", type=whole(1), default=1, metavar="N", help="of the run, all nodes together (1)")
    add("--gpu_memory", type=number_between(0, 10_000), metavar="GIB", help="of one GPU: find settings that fit")
    add("--sample", type=whole(1), metavar="N", help="look at so many rows, drawn at random (all)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the drawing (0)")
    add("--workers", type=whole(1), metavar="N", help="processes (one per core, where rows are many)")
    add("--chart", metavar="FILE", help="draw a .png too (needs matplotlib)")
    add("--json", metavar="FILE", help="write all numbers as .json too")
    add("--overwrite", action="store_true", help="replace files that are there")
    add_text_flags(parser)
    add_training_flags(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    return build_parser().parse_args(argv)


def run(options: argparse.Namespace) -> Outcome:
    """Measure, advise and write; returns how it ended.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
    """
    inputs = [*options.data, *options.val_files]
    if options.json:
        report = check_target("--json", options.json, options.overwrite, inputs, (".json",))
    if options.chart:
        chart = check_target("--chart", options.chart, options.overwrite, inputs, (".png",))
        require("matplotlib", "matplotlib", "--chart")
    from verl.data_tools.lengths.report import render, to_json, write_chart

    lengths, limits, advices = _look(options)
    if options.chart:
        write_chart(chart, lengths, limits)
    if options.json:
        write_report(report, to_json(lengths, limits, advices, vars(options)))
    drawn = f" (drawn of {', '.join(options.data)})" if options.sample else f" of {', '.join(options.data)}"
    source = (
        f"{len(lengths.prompts)} rows{drawn}; prompts as {options.model}'s chat template has them, answers with EOS"
    )
    written = [f"wrote {file}" for file in (options.chart, options.json) if file]
    return Outcome("\n\n".join([render(lengths, source, advices), *written]))


def _look(options: argparse.Namespace) -> tuple[Lengths, Limits, list[Advice]]:
    import numpy as np

    from verl.data_tools.lengths.advice import advise
    from verl.data_tools.lengths.limits import fit
    from verl.data_tools.lengths.measure import Columns, measure
    from verl.data_tools.lengths.room import Machine
    from verl.data_tools.model import context_of, find_tokenization
    from verl.models.loading import quiet_transformers
    from verl.utils.dataset.rl_dataset import find_files

    quiet_transformers()
    tokenization = find_tokenization(
        options.model, options.apply_chat_template_kwargs, options.special_token_text, options.trust_remote_code
    )
    machine = None
    if options.gpu_memory is not None:
        machine = Machine.of(options.model, options.gpu_memory, options.trust_remote_code)
    drawing = (options.sample, options.seed, options.workers)
    columns = Columns(options.prompt_key, options.teacher_key, options.on_bad_row)
    lengths = measure(find_files(options.data), tokenization, columns, *drawing)
    prompts, answers = lengths.prompts, lengths.answers
    if options.val_files:
        held_out = measure(find_files(options.val_files), tokenization, columns, *drawing)
        prompts, answers = (
            np.concatenate(sides) for sides in ((prompts, held_out.prompts), (answers, held_out.answers))
        )
    limits = fit(prompts, answers, options.keep, context_of(options.model, options.trust_remote_code))
    rows = int((lengths.prompts <= limits.prompt).sum())
    # Of a sample, as many as there would be of all.
    rows = rows * lengths.total // lengths.looked_at
    advices = [
        advise(stage, limits, rows, options.keep, options.model, options.gpus, machine) for stage in options.stage
    ]
    return lengths, limits, advices


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_tool(run, parse(argv))
