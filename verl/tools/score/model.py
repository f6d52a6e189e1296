"""A discriminator read from disk, and its scores of any sequences, without a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from verl.models.answer_models import ScoreModel
from verl.models.finding import check_files, config_entries, is_discriminator
from verl.models.loading import check_labels, load_model
from verl.models.proof import class_verdict
from verl.tools.prompts import PromptAndAnswer, to_rows
from verl.trainer.ppo.discriminator_algos import POOLINGS
from verl.utils.seqlen_balancing import rearrange_micro_batches
from verl.workers.critic.groups import RowScores, scored_rows

# Micro-batches are cut from so many sequences of like length at a time: the cost of balancing grows with the square.
WINDOW = 256


# ---------------------------------------------------------------------------------------------------------------------
# The critic


@dataclass(frozen=True)
class Scoring:
    """How values per token become a score, and the loss it was trained with, where that is known: under it the
    teacher's answer is the better one with probability sigmoid(d / temperature)."""

    pooling: str
    exclude_eos: bool
    loss: str | None = None
    temperature: float = 1.0

    def __str__(self) -> str:
        trained = f", trained with {self.loss}" if self.loss else ""
        return f"{self.pooling} pooling, EOS {'excluded' if self.exclude_eos else 'included'}{trained}"


def check_critic(path: str) -> None:
    """Look at the folder before it is read.

    Raises:
        FileNotFoundError, ValueError: it holds no model with a score head of one label, or is not whole; says what to
            pass.
    """
    inside = Path(path).expanduser() / "critic"
    if inside.is_dir():
        raise ValueError(f"--critic: expected a critic's folder, got the whole checkpoint {path}; pass {inside}")
    entries = config_entries(path)
    if not is_discriminator(path):
        raise ValueError(
            f"--critic: expected a model with a trained score head (...ForTokenClassification), got {path} with "
            f"{entries.get('architectures')}; pass global_step_N/critic of a warmup or GAD run, or that one merged"
        )
    check_labels(path)
    check_files(path)


def scoring_of(config: PretrainedConfig, pooling: str | None, exclude_eos: bool | None) -> Scoring:
    """What the command line says, else what the checkpoint's config says under `discriminator`.

    Raises:
        ValueError: neither says it; scores would be a guess.
    """
    trained = getattr(config, "discriminator", None) or {}
    pooling = pooling or trained.get("pooling")
    exclude_eos = trained.get("exclude_eos") if exclude_eos is None else exclude_eos
    if pooling is None or exclude_eos is None:
        missing = ["--pooling last_token, mean or sum"] if pooling is None else []
        missing += ["--include_eos or --exclude_eos"] if exclude_eos is None else []
        raise ValueError(
            "expected the pooling and the handling of EOS in the critic's config.json under 'discriminator', got "
            f"{trained or 'no such entry'}; pass {' and '.join(missing)}, as the critic was trained"
        )
    if pooling not in POOLINGS:
        raise ValueError(f"expected a pooling of {', '.join(POOLINGS)}, got {pooling!r} in config.json; pass --pooling")
    return Scoring(pooling, exclude_eos, trained.get("loss"), trained.get("temperature", 1.0))


def load_critic(path: str, config: PretrainedConfig, dtype: str, device: str, trust_remote_code: bool) -> ScoreModel:
    """The model on its device; one that cannot be packed runs padded, as it must have been trained."""
    hf = load_model(path, "score", trust_remote_code=trust_remote_code, dtype=getattr(torch, dtype), fresh_head=False)
    return ScoreModel(hf, remove_padding=can_pack(hf)).to(device).eval()


def can_pack(hf: PreTrainedModel) -> bool:
    """Whether rows of any length can be packed."""
    verdict = class_verdict(ScoreModel, type(hf), hf.config, remove_padding=True)
    return verdict.fault is None and verdict.longest is None


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def _micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Sequence numbers, the longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for rows in rearrange_micro_batches([lengths[number] for number in window], max_tokens):
            yield [window[row] for row in rows]


@torch.no_grad()
def score_sequences(
    model: ScoreModel,
    sequences: Sequence[PromptAndAnswer],
    scoring: Scoring,
    eos_token_id: int,
    max_tokens: int,
    progress_bar: bool = True,
) -> dict[str, np.ndarray]:
    """`score`, `raw_score` (the sum over the same tokens) and `score_tokens` of each sequence, (S,) each.

    Args:
        max_tokens: real tokens per forward; a longer sequence is alone in one.

    Raises:
        ValueError: a score is not finite.
    """
    result = {name: np.zeros(len(sequences), np.float32) for name in ("score", "raw_score")}
    result["score_tokens"] = np.zeros(len(sequences), np.int64)
    lengths = [len(sequence.prompt) + len(sequence.answer) for sequence in sequences]
    without_eos = torch.tensor([scoring.exclude_eos or sequence.cut_group for sequence in sequences])
    # None: no bar where nobody watches.
    hidden = None if progress_bar else True
    with tqdm(total=len(sequences), desc="scoring", unit="answer", dynamic_ncols=True, disable=hidden) as progress:
        for numbers in _micro_batches(lengths, max_tokens):
            rows = to_rows([sequences[number] for number in numbers])
            # Whole answers are forwarded. Training leaves out an EOS that is not scored: the same but for rounding.
            scored = scored_rows(rows, eos_token_id, without_eos[numbers])
            scores = RowScores.pool(model(rows).cpu(), scored.response_mask, scoring.pooling)
            for name, values in zip(result, scores, strict=True):
                result[name][numbers] = values
            progress.update(len(numbers))
    unsound = int((~np.isfinite(result["score"])).sum())
    if unsound:
        raise ValueError(
            f"expected finite scores, got {unsound} of {len(sequences)} that are not; the critic has diverged (take an "
            "earlier checkpoint), or --dtype is too narrow (pass float32)"
        )
    return result
