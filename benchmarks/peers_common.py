"""What every peer is given alike: the size of an SFT step, and the settings of a GRPO step."""

from __future__ import annotations

import argparse

from benchmarks.inputs import MIXED, TINY, Lengths, batch_of_tokens, rows_of
from benchmarks.shapes import SHAPES
from verl.models.packing import AnswerRows

STEP_TOKENS, TINY_STEP_TOKENS = 131072, 1024
TEMPERATURE, KL_COEF, LEARNING_RATE = 0.8, 0.001, 1e-6


def sft_lengths(args: argparse.Namespace) -> Lengths:
    """Lengths in tokens of SFT's prompts and answers."""
    return TINY if args.shape == "tiny" else MIXED


def sft_rows(args: argparse.Namespace, steps: int) -> AnswerRows:
    """The rows that `steps` steps of SFT hold: those of our own benchmark, for one step."""
    tokens = steps * (TINY_STEP_TOKENS if args.shape == "tiny" else STEP_TOKENS)
    return rows_of("sft", batch_of_tokens(SHAPES[args.shape], "sft", args.n, sft_lengths(args), tokens))
