"""How well can a fresh discriminator tell a student's answers from the teacher's? The classifier two-sample test.

Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests" (arXiv 1610.06545), for pairs: a discriminator is trained on
some prompts to score the teacher's answer above the student's, and the statistic is how often it does on others. Where
both sides are drawn from one distribution no discriminator beats 1/2, whatever it learned; the further above, the
easier they are to tell apart. Every prompt is tested once per seed, by a discriminator trained on the other folds.

Written apart from the trainer's discriminator: fresh head, own loop, one loss. P prompts, K pairs, S seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from verl.models.answer_models import ScoreModel
from verl.models.loading import load_model
from verl.tools.judge.statistics import CROSS_VALIDATED, Estimate, clustered_mean
from verl.tools.prompts import PromptAndAnswer, to_rows
from verl.tools.score.model import Scoring, can_pack, score_sequences
from verl.trainer.ppo.discriminator_algos import pool_scores
from verl.utils.progress import Progress

SCORING = Scoring(pooling="mean", exclude_eos=False)
MATCHES = (0.1, 0.2)  # how far lengths of a pair may differ, of the longer one
WARMUP = 0.1  # of the updates
WEIGHT_DECAY, MAX_GRADIENT_NORM = 0.01, 1.0
# Of `Judge`: raised when it is changed, so that what was found by another one is not taken again.
MADE_BY = 1


@dataclass(frozen=True)
class JudgeSettings:
    """How discriminators are trained; `batch_size` counts pairs per update, `max_tokens` tokens per forward."""

    seeds: int = 3
    folds: int = 5
    epochs: int = 2
    batch_size: int = 16
    lr: float = 2e-5
    max_tokens: int = 8192

    # What changes the outcome of no discriminator, or by the pairs alone that it is trained and tested on.
    _FREE = ("seeds", "folds", "max_tokens")

    def shaping(self) -> dict[str, Any]:
        """What outcomes that are to be taken again must have been found with."""
        own = {key: value for key, value in asdict(self).items() if key not in self._FREE}
        return own | {"made_by": MADE_BY, "scoring": asdict(SCORING), "rest": [WARMUP, WEIGHT_DECAY, MAX_GRADIENT_NORM]}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt (its number, from 0); ids with EOS where an answer ended."""

    prompt: int
    reference: PromptAndAnswer
    candidate: PromptAndAnswer

    @property
    def tokens(self) -> int:
        """To forward, prompts counted twice."""
        return sum(len(side.prompt) + len(side.answer) for side in (self.reference, self.candidate))

    @property
    def length_gap(self) -> float:
        """|difference| of the answers' lengths over the longer one."""
        lengths = len(self.reference.answer), len(self.candidate.answer)
        return 1 - min(lengths) / max(lengths)


Ids = Sequence[Sequence[tuple[int, ...]]]


def make_pairs(prompts: Sequence[tuple[int, ...]], references: Ids, candidates: Ids) -> list[Pair]:
    """Each candidate answer with a reference answer to the same prompt; these are gone round where they are fewer."""
    return [
        Pair(number, PromptAndAnswer(prompt, wanted[k % len(wanted)]), PromptAndAnswer(prompt, answer))
        for number, (prompt, wanted, answers) in enumerate(zip(prompts, references, candidates, strict=True))
        for k, answer in enumerate(answers)
    ]


def fold_of_prompts(prompts: int, folds: int, seed: int) -> np.ndarray:
    """The fold that each prompt is tested in, (P,); sizes differ by at most one."""
    return np.random.default_rng(seed).permutation(np.arange(prompts) % folds)


# ---------------------------------------------------------------------------------------------------------------------
# One discriminator


class Judge:
    """A discriminator that can be made fresh again: the base model's weights, and a score head drawn from a seed.

    In a narrower type than fp32 the model computes in it, and the optimizer trains fp32 copies; the head stays in fp32.
    """

    def __init__(self, path: str, settings: JudgeSettings, device: str, dtype: str, trust_remote_code: bool = False):
        hf = load_model(path, "score", trust_remote_code=trust_remote_code)
        self.settings = settings
        self.base = [parameter.detach().clone() for parameter in hf.parameters()]
        # Weights alone: what the model computes positions with stays in fp32.
        for parameter in hf.base_model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        self.model = ScoreModel(hf, remove_padding=can_pack(hf)).to(device)
        self.weights = list(hf.parameters())
        self.masters = [w if w.dtype == torch.float32 else w.detach().float().requires_grad_() for w in self.weights]

    def reset(self, seed: int) -> None:
        """Back to the base model with a head that `seed` draws; what it was trained on is forgotten."""
        head, config = self.model.head, self.model.hf.config
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for master, base in zip(self.masters, self.base, strict=True):
                master.copy_(base)
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * config.initializer_range)
            if head.bias is not None:
                head.bias.zero_()

    def train(self, pairs: Sequence[Pair], seed: int, progress: Progress) -> float:
        """Train a fresh one; returns its accuracy over the last epoch, each pair scored before the update it is in.

        The loss is the mean over a batch of -logsigmoid(score(reference) - score(candidate)), under AdamW with a linear
        warmup and a linear decay to 0.
        """
        self.reset(seed)
        settings = self.settings
        optimizer = torch.optim.AdamW(self.masters, lr=settings.lr, weight_decay=WEIGHT_DECAY)
        updates = settings.epochs * updates_per_epoch(len(pairs), settings)
        warmup = max(1, round(WARMUP * updates))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min((done + 1) / warmup, (updates - done) / max(1, updates - warmup))
        )
        generator = np.random.default_rng(seed)
        self.model.train()
        outcomes: list[torch.Tensor] = []
        for _ in range(settings.epochs):
            outcomes = []
            order = generator.permutation(len(pairs))
            for batch in np.array_split(order, updates_per_epoch(len(pairs), settings)):
                outcomes += self._backward([pairs[number] for number in batch])
                self._step(optimizer)
                schedule.step()
                progress.update()
        return float(outcome_of(torch.cat(outcomes).cpu().numpy()).mean())

    def _backward(self, batch: Sequence[Pair]) -> list[torch.Tensor]:
        """Gradients of the batch's mean loss; returns score differences, part by part."""
        differences = []
        for part in split_pairs(batch, self.settings.max_tokens):
            rows = to_rows([sequence for pair in part for sequence in (pair.reference, pair.candidate)])
            values = self.model(rows)
            scores = pool_scores(values, rows.response_mask.to(values.device), SCORING.pooling).view(-1, 2)
            difference = scores[:, 0] - scores[:, 1]
            (-F.logsigmoid(difference).sum() / len(batch)).backward()
            differences.append(difference.detach())
        return differences

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master is not weight:
                    weight.copy_(master)

    def differences(self, pairs: Sequence[Pair], eos_token_id: int) -> np.ndarray:
        """score(reference) - score(candidate), (K,); equal answers differ by exactly 0."""
        self.model.eval()
        seen: dict[PromptAndAnswer, int] = {}
        places = [[seen.setdefault(s, len(seen)) for s in (pair.reference, pair.candidate)] for pair in pairs]
        tokens = self.settings.max_tokens
        scores = score_sequences(self.model, list(seen), SCORING, eos_token_id, tokens, progress_bar=False)["score"]
        left, right = scores[np.array(places)].T
        return left - right


def updates_per_epoch(pairs: int, settings: JudgeSettings) -> int:
    """Batches of at most `batch_size` pairs, as equal as can be."""
    return -(-pairs // settings.batch_size)


def split_pairs(batch: Sequence[Pair], max_tokens: int) -> Iterator[list[Pair]]:
    """Runs of pairs of at most so many tokens together; a longer pair is alone."""
    part: list[Pair] = []
    tokens = 0
    for pair in batch:
        if part and tokens + pair.tokens > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(pair)
        tokens += pair.tokens
    yield part


def outcome_of(differences: np.ndarray) -> np.ndarray:
    """1 where the reference is scored higher, 1/2 for a tie, 0 otherwise."""
    return (np.sign(differences) + 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# The test


@dataclass(frozen=True)
class TwoSample:
    """Of one student: `outcomes` (S, K), see `outcome_of`; `prompts` (K,) and `gaps` (K,) of lengths; `fitted`, the
    mean accuracy of the discriminators on what they were trained on."""

    outcomes: np.ndarray
    prompts: np.ndarray
    gaps: np.ndarray
    fitted: float

    @property
    def per_pair(self) -> np.ndarray:
        """(K,) averaged over seeds."""
        return self.outcomes.mean(0)

    @property
    def accuracy(self) -> Estimate:
        """Over all pairs; 1/2 is a student that cannot be told from the reference. The interval allows for what
        cross-validation adds."""
        return clustered_mean(self.per_pair, self.prompts, widening=CROSS_VALIDATED)

    @property
    def by_seed(self) -> list[float]:
        """The accuracy of each seed's discriminators, (S,)."""
        return self.outcomes.mean(1).tolist()

    def matched(self, gap: float) -> Estimate:
        """Over the pairs whose lengths differ by at most `gap` of the longer one: length tells little in these."""
        near = self.gaps <= gap + 1e-9
        return clustered_mean(self.per_pair[near], self.prompts[near], widening=CROSS_VALIDATED)
