"""The scorer's work: `command.py` has the command, `data.py` reads and tokenises, `model.py` scores, `report.py` counts
and writes. Scores are those of training: the same tokens, model, pooling and handling of EOS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from verl.models.loading import load_config
from verl.models.tokenizer import all_eos_token_ids, load_tokenizer
from verl.tools.command import check_device
from verl.tools.flags import SUFFIXES
from verl.tools.prompts import Limits
from verl.tools.score.data import TokenizedGroups, read_groups, tokenize_groups
from verl.tools.score.model import Scoring, check_critic, load_critic, score_sequences, scoring_of
from verl.tools.score.report import pair_table, render, write_table
from verl.utils.dataset.texts import Tokenization, eos_texts


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
