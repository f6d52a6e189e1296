"""The command: flags in, report out."""

from __future__ import annotations

from collections.abc import Sequence

from verl.config.critic import DiscriminatorConfig
from verl.tools.command import (
    CommandParser,
    add_column_flags,
    add_token_flags,
    choices_of,
    command_parser,
    run_command,
)
from verl.tools.flags import ANSWER_KEYS, whole

REQUIRED = "--critic DIR --data FILE ..."
DESCRIPTION = "Scores teacher and student answers with any discriminator, and reports how well it tells them apart."
EXAMPLE = "example: %(prog)s --critic checkpoints/gad/warmup/global_step_50/critic --data answers.parquet --out x.jsonl"
MORE = """\
--data is parquet or jsonl, one row per prompt with the teacher's answer and one student answer or a list of them. Dumps
of training rollouts (trainer.rollout_data_dir) have no prompts: pass data.train_files with --prompts.

The report: mean and standard deviation (divided by n) of the scores of both sides and of d = score(teacher) -
score(student); accuracy; calibration of sigmoid(|d| / T), T the loss's temperature, with the expected calibration error
(arXiv 1706.04599); Pearson correlations with length in tokens; the most and the least separated pairs.

--out has one row per pair: group, file, row, answer (from 0), score_diff, prompt_tokens and, with teacher_ and student_
before them, score (pooled), raw_score (the sum), score_tokens (pooled over) and tokens (of the answer, EOS included).
"""


def build_parser() -> CommandParser:
    """The flags; names of columns and limits are those of the trainer's `data` settings where it has them."""
    parser = command_parser("score", REQUIRED, DESCRIPTION, EXAMPLE, MORE)
    add = parser.add_argument
    add("--critic", required=True, metavar="DIR", help="a checkpoint's critic folder as it is, or merged")
    add("--data", required=True, nargs="+", metavar="FILE", help="parquet or jsonl files to score")
    add("--out", metavar="FILE", help="write the scores of every pair, .parquet or .jsonl (default: report only)")

    columns = parser.special_group("columns")
    add_column_flags(columns)
    add = columns.add_argument
    add(
        "--answer_key", metavar="KEY", help=f"a text or texts (default: the first there is of {', '.join(ANSWER_KEYS)})"
    )
    add("--prompts", nargs="+", default=[], metavar="FILE", help="files whose rows the data's `index` column names")

    scores = parser.special_group("scores", "By default as the critic was trained, from its config.json.")
    scores.add_argument(
        "--pooling", choices=choices_of(DiscriminatorConfig, "pooling"), help="of the values per token into a score"
    )
    eos = scores.add_mutually_exclusive_group()
    eos.add_argument("--exclude_eos", action="store_true", default=None, help="leave the closing EOS out of the score")
    eos.add_argument("--include_eos", action="store_false", dest="exclude_eos", default=None, help="score it too")

    tokens = parser.special_group("tokens")
    add_token_flags(tokens)
    tokens.add_argument(
        "--max_response_length",
        type=whole(1),
        metavar="N",
        help="tokens of an answer with EOS; longer ones are cut as in training, and counted (default: no limit)",
    )

    computing = parser.special_group("computing")
    add = computing.add_argument
    add("--max_tokens", type=whole(1), default=16384, metavar="N", help="tokens per forward (default: 16384)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--trust_remote_code", action="store_true", help="run the model folder's own code")

    report = parser.special_group("report")
    add = report.add_argument
    add("--bins", type=whole(1), default=10, metavar="N", help="of the calibration (default: 10)")
    add("--show", type=whole(0), default=5, metavar="K", help="pairs to show from either end (default: 5)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = build_parser().parse_args(arguments)
    # Not above: help is wanted at once, and this reads torch.
    from verl.tools.score.run import run

    run_command(run, options)
