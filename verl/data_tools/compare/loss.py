"""How hard the answers are for a student: its cross-entropy of each, by the trainer's packed forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verl.data_tools.compare.data import Side
from verl.data_tools.compare.statistics import Finding, Interval, difference_of_means, kolmogorov_smirnov
from verl.models.answer_models import PolicyModel
from verl.models.finding import check_files, refuse_discriminator
from verl.models.loading import load_model
from verl.models.proof import class_verdict
from verl.tools.prompts import PromptAndAnswer, to_rows
from verl.utils.dataset.texts import Tokenization
from verl.utils.progress import Progress
from verl.utils.seqlen_balancing import rearrange_micro_batches


@dataclass(frozen=True)
class Difficulty:
    """Mean loss of an answer, in nats per token with EOS, of A's rows and of B's, and B's less A's."""

    a: float
    b: float
    rows: tuple[int, int]
    difference: Interval
    distance: float
    p: float


def check_student(folder: str) -> None:
    """FileNotFoundError or ValueError where the folder holds no whole language model."""
    check_files(folder)
    refuse_discriminator(folder)


def load_student(folder: str, device: str, dtype: str, trust_remote_code: bool) -> PolicyModel:
    """The model, packed where it can be."""
    hf = load_model(folder, "policy", trust_remote_code=trust_remote_code, dtype=getattr(torch, dtype))
    verdict = class_verdict(PolicyModel, type(hf), hf.config, remove_padding=True)
    packed = verdict.fault is None and verdict.longest is None
    return PolicyModel(hf, remove_padding=packed).to(device).eval()


@torch.no_grad()
def losses(
    model: PolicyModel,
    tokenization: Tokenization,
    side: Side,
    rows: Sequence[int],
    max_tokens: int,
    context: int | None,
) -> np.ndarray:
    """The mean loss of each answer, in nats per token with EOS, of those of the rows that fit into the model's context.

    Raises:
        ValueError: none fits, or a loss is not finite.
    """
    prompts = tokenization.prompts([side.messages[at] for at in rows])
    answers = tokenization.answers([side.answers[at] for at in rows])
    pairs = zip(prompts, answers, strict=True)
    sequences = [PromptAndAnswer(tuple(p), tuple(a)) for p, a in pairs if context is None or len(p) + len(a) <= context]
    if not sequences:
        raise ValueError(
            f"{side.name}: expected rows that fit into the student's context of {context} tokens, got none"
        )
    lengths = [len(sequence.prompt) + len(sequence.answer) for sequence in sequences]
    found = np.zeros(len(sequences))
    with Progress(len(sequences), f"loss on {side.name}", "row") as bar:
        for numbers in rearrange_micro_batches(lengths, max_tokens):
            batch = to_rows([sequences[number] for number in numbers])
            sums = model.values(batch).double().sum(-1).cpu().numpy()
            found[numbers] = -sums / np.array([len(sequences[number].answer) for number in numbers])
            bar.update(len(numbers))
    if not np.isfinite(found).all():
        raise ValueError(f"{side.name}: expected finite losses, got {int((~np.isfinite(found)).sum())} that are not")
    return found


def compare_losses(a: np.ndarray, b: np.ndarray) -> Difficulty:
    """Of losses (A,) and (B,)."""
    distance, p = kolmogorov_smirnov(a, b)
    return Difficulty(float(a.mean()), float(b.mean()), (len(a), len(b)), difference_of_means(a, b), distance, p)


def drawn(side: Side, rows: int, seed: int) -> list[int]:
    """So many rows of a side, or all."""
    if rows >= len(side):
        return list(range(len(side)))
    return sorted(np.random.default_rng(seed).choice(len(side), rows, replace=False).tolist())


def finding(result: Difficulty, names: tuple[str, str]) -> Finding:
    """In words."""
    harder = names[1] if result.difference.value > 0 else names[0]
    return Finding(
        "difficulty of answers",
        result.distance,
        result.p,
        f"the answers of {harder} are harder for the student: its loss is {result.a:.3f} on {names[0]} and "
        f"{result.b:.3f} on {names[1]}",
    )
