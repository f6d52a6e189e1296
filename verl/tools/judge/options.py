"""The judge's flags."""

from __future__ import annotations

import argparse

from verl.tools.command import CommandParser, add_column_flags, add_token_flags, command_parser
from verl.tools.flags import json_object, number, share, whole

REQUIRED = "--data FILE ... --student NAME=FOLDER ... --out DIR"
DESCRIPTION = """\
Is this student closer to the teacher now? Judges students on prompts that none of them was trained on: by fresh
discriminators that try to tell each from the teacher (--judge_model), by a strong model behind an OpenAI-compatible
endpoint that compares answers pair by pair (--endpoint), and by plain numbers (always).
"""
EXAMPLE = """\
example: %(prog)s --data held_out.parquet --judge_model BASE --out judge \\
           --student base=BASE --student seqkd=checkpoints/gad/seqkd/global_step_200/actor
"""
# Which answer is better; which is closer to the teacher's.
QUESTIONS = ("better", "closer")
MORE = """\
--data is parquet or jsonl, one row per prompt with the teacher's answer, as for training; take prompts that no student
was trained on, 300 or more: with n prompts the interval reaches at most about 1.4/sqrt(n) to both sides. A
student is a model's folder (Hugging Face, or a checkpoint's actor folder), which is asked --samples times per prompt,
or a file of answers: a column with a text or a list of texts, found by the prompts beside them, or by row where the
file has none. A column `cut` (true or false) or `finish_reason` ("length") says which of them did not end.

Students are compared in the order given, each with the one before it: base first, then stage after stage.

To see that the judge does not see what is not there, judge a student against a copy of itself, with other draws:
    --student a=FOLDER --student b=FOLDER --against a
The interval should hold 0.5. To see that it sees what is there, judge the base model too.

--out gets judge.json, judge.png with --plot, answers/NAME.jsonl, discriminators.jsonl and verdicts.jsonl; a later run
with the same settings generates no answer, trains no discriminator and asks for no verdict again. The endpoint's key is
read from OPENAI_API_KEY and written nowhere.
"""


def build_parser() -> CommandParser:
    """The flags; names of columns and limits are those of the trainer's `data` settings where it has them."""
    parser = command_parser("judge", REQUIRED, DESCRIPTION, EXAMPLE, MORE)
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="FILE", help="prompts with the teacher's answers")
    add(
        "--student",
        required=True,
        action="append",
        metavar="NAME=FOLDER|FILE[:COLUMN]",
        help="a model's folder, or answers in a file; once for each student",
    )
    add("--out", required=True, metavar="DIR", help="report, answers and verdicts go there")
    add("--plot", action="store_true", help="draw DIR/judge.png too (needs matplotlib)")
    add("--train_files", nargs="+", default=[], metavar="FILE", help="refuse prompts that occur in these")
    add("--against", default="teacher", metavar="NAME", help="whom to tell the others from (default: teacher)")
    add("--max_prompts", type=whole(1), metavar="N", help="only the first so many prompts (default: all)")
    _add_text(parser.special_group("columns and tokens"))
    _add_generating(parser.special_group("answers of model folders"))
    _add_two_sample(parser.special_group("fresh discriminators"))
    _add_pairwise(parser.special_group("pairwise verdicts of an OpenAI-compatible endpoint"))
    computing = parser.special_group("computing")
    add = computing.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="to compute in; weights are trained in float32 (default: bfloat16 on cuda, float32 on cpu)",
    )
    add("--trust_remote_code", action="store_true", help="run the model folders' own code")
    return parser


def _add_text(group: argparse._ArgumentGroup) -> None:
    add_column_flags(group)
    add = group.add_argument
    add("--tokenizer", metavar="DIR", help="counts lengths (default: the judge model's, or the first student's)")
    add_token_flags(group)
    add(
        "--max_response_length",
        type=whole(1),
        default=1024,
        metavar="N",
        help="tokens of an answer with EOS, to generate and to look at; longer ones of either side are cut (default: "
        "1024)",
    )


def _add_generating(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--temperature", type=number(0.0), default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    add("--samples", type=whole(1), default=2, metavar="N", help="answers to each prompt (default: 2)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the draws (default: 0)")
    add(
        "--engine",
        choices=("auto", "hf", "vllm"),
        default="auto",
        help="(default: vllm on cuda where it is installed, else hf)",
    )
    add("--max_num_seqs", type=whole(1), default=256, metavar="N", help="answers generated at once (default: 256)")
    add(
        "--gpu_memory_utilization",
        type=share(0.01),
        default=0.8,
        metavar="X",
        help="vLLM's share of the device while it generates (default: 0.8)",
    )


def _add_two_sample(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--judge_model", metavar="DIR", help="the model they start from; left out, they are not asked")
    add("--judge_seeds", type=whole(1), default=3, metavar="N", help="repetitions (default: 3)")
    add("--folds", type=whole(2), default=5, metavar="N", help="of the prompts; each is tested once (default: 5)")
    add("--judge_epochs", type=whole(1), default=2, metavar="N", help="(default: 2)")
    add("--judge_lr", type=number(1e-12), default=2e-5, metavar="X", help="(default: 2e-5)")
    add("--judge_batch_size", type=whole(1), default=16, metavar="N", help="pairs per update (default: 16)")
    add("--max_tokens", type=whole(1), default=8192, metavar="N", help="tokens per forward (default: 8192)")
    add("--no_compile", action="store_true", help="do not compile their layers, as is done on a GPU")


def _add_pairwise(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--endpoint", metavar="URL", help="such as http://127.0.0.1:8000/v1; left out, it is not asked")
    add("--endpoint_model", metavar="NAME", help="the model's name there")
    add(
        "--ask",
        choices=QUESTIONS,
        default="better",
        help="which answer is better, or closer to the teacher's, for --against a student (default: better)",
    )
    add("--pairwise_prompts", type=whole(1), metavar="N", help="only the first so many prompts (default: all)")
    add("--concurrency", type=whole(1), default=8, metavar="N", help="requests at once (default: 8)")
    add("--timeout", type=number(1e-3), default=120.0, metavar="S", help="seconds per request (default: 120)")
    add("--retries", type=whole(0), default=6, metavar="N", help="after 429, 5xx, timeouts (default: 6)")
    add(
        "--endpoint_options",
        type=json_object,
        default={},
        metavar="JSON",
        help='into every request; null takes one out: {"temperature": null} (default: {})',
    )
