"""Score teacher and student answers with any discriminator, offline, and report how well it tells them apart.

    python -m verl.tools.score --critic runs/warmup/global_step_50/critic --data answers.parquet --out x.jsonl

Scores are those of training: the same tokens, model, pooling and handling of EOS. `data.py` reads and tokenises,
`model.py` scores, `report.py` counts and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from verl.models.loading import all_eos_token_ids, load_config, load_tokenizer
from verl.tools.command import add_column_flags, add_token_flags, check_device, command_parser, run_command
from verl.tools.flags import whole
from verl.tools.prompts import ANSWER_KEYS, SUFFIXES, Limits
from verl.tools.score.data import TokenizedGroups, read_groups, tokenize_groups
from verl.tools.score.model import Scoring, check_critic, load_critic, score_sequences, scoring_of
from verl.tools.score.report import pair_table, render, write_table
from verl.trainer.ppo.discriminator_algos import POOLINGS
from verl.utils.dataset.texts import Tokenization, eos_texts

EPILOG = """\
--data is parquet or jsonl, one row per prompt with the teacher's answer and one student answer or a list of them. Dumps
of training rollouts (trainer.rollout_data_dir) have no prompts: pass data.train_files with --prompts.

The report: mean and standard deviation (divided by n) of the scores of both sides and of d = score(teacher) -
score(student); accuracy; calibration of sigmoid(|d| / T), T the loss's temperature, with the expected calibration error
(arXiv 1706.04599); Pearson correlations with length in tokens; the most and the least separated pairs.

--out has one row per pair: group, file, row, answer (from 0), score_diff, prompt_tokens and, with teacher_ and student_
before them, score (pooled), raw_score (the sum), score_tokens (pooled over) and tokens (of the answer, EOS included).
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags; names of columns and limits are those of the trainer's `data` settings where it has them."""
    parser = command_parser("score", __doc__, EPILOG)
    add = parser.add_argument
    add("--critic", required=True, metavar="DIR", help="a checkpoint's critic folder as it is, or merged")
    add("--data", required=True, nargs="+", metavar="FILE", help="parquet or jsonl files to score")
    add("--out", metavar="FILE", help="write the scores of every pair, .parquet or .jsonl (default: report only)")

    columns = parser.add_argument_group("columns")
    add_column_flags(columns)
    add = columns.add_argument
    add(
        "--answer_key", metavar="KEY", help=f"a text or texts (default: the first there is of {', '.join(ANSWER_KEYS)})"
    )
    add("--prompts", nargs="+", default=[], metavar="FILE", help="files whose rows the data's `index` column names")

    scores = parser.add_argument_group("scores", "By default as the critic was trained, from its config.json.")
    scores.add_argument("--pooling", choices=POOLINGS, help="of the values per token into a score")
    eos = scores.add_mutually_exclusive_group()
    eos.add_argument("--exclude_eos", action="store_true", default=None, help="leave the closing EOS out of the score")
    eos.add_argument("--include_eos", action="store_false", dest="exclude_eos", default=None, help="score it too")

    tokens = parser.add_argument_group("tokens")
    add_token_flags(tokens)
    tokens.add_argument(
        "--max_response_length",
        type=whole(1),
        metavar="N",
        help="tokens of an answer with EOS; longer ones are cut as in training, and counted (default: no limit)",
    )

    computing = parser.add_argument_group("computing")
    add = computing.add_argument
    add("--max_tokens", type=whole(1), default=16384, metavar="N", help="tokens per forward (default: 16384)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: float32)")
    add("--trust_remote_code", action="store_true", help="run the model folder's own code")

    report = parser.add_argument_group("report")
    add = report.add_argument
    add("--bins", type=whole(1), default=10, metavar="N", help="of the calibration (default: 10)")
    add("--show", type=whole(0), default=5, metavar="K", help="pairs to show from either end (default: 5)")
    return parser


def check_out(out: str | None) -> None:
    """ValueError for an output that cannot be written, before any work is done."""
    if out is not None and (Path(out).suffix not in SUFFIXES or Path(out).is_dir()):
        raise ValueError(f"--out: expected a file that ends in {' or '.join(SUFFIXES)}, got {out}; rename it")


def run(options: argparse.Namespace) -> str:
    """Score and write; returns the report.

    Raises:
        OSError, ValueError: a user's error, as a sentence; all but a diverged critic before the model is loaded.
    """
    check_out(options.out)
    check_device(options.device)
    check_critic(options.critic)
    config = load_config(options.critic, "score", trust_remote_code=options.trust_remote_code)
    scoring = scoring_of(config, options.pooling, options.exclude_eos)
    groups = read_groups(options.data, options.prompt_key, options.teacher_key, options.answer_key, options.prompts)
    tokenizer = load_tokenizer(options.critic, options.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = Limits(options.max_prompt_length, options.max_response_length, options.truncation, context)
    ends = eos_texts(tokenizer, all_eos_token_ids(tokenizer, options.critic))
    tokenization = Tokenization(tokenizer, options.apply_chat_template_kwargs, ends, options.special_token_text)
    tokenized = tokenize_groups(groups, tokenization, limits)

    model = load_critic(options.critic, config, options.dtype, options.device, options.trust_remote_code)
    scores = score_sequences(model, tokenized.sequences, scoring, tokenizer.eos_token_id, options.max_tokens)
    pairs = pair_table(groups, tokenized, scores)
    lines = [
        _header(options.critic, scoring, tokenized, pairs),
        render(pairs, groups, scoring.temperature, options.bins, options.show),
    ]
    if options.out:
        write_table(pairs, Path(options.out).expanduser())
        lines.append(f"wrote {len(pairs)} pairs to {options.out}")
    return "\n\n".join(lines)


def _header(critic: str, scoring: Scoring, tokenized: TokenizedGroups, pairs: pd.DataFrame) -> str:
    lines = [f"critic  {critic}: {scoring}"]
    for path, part in pairs.groupby("file", sort=False):
        lines.append(f"data    {path}: {part['group'].nunique()} prompts, {len(part)} student answers")
    if tokenized.cut_prompts or tokenized.cut_answers:
        answers = f"{tokenized.cut_answers} answers of both sides"
        lines.append(f"cut     {tokenized.cut_prompts} prompts and {answers}, as the limits say")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    main()
