"""Groups on their way through the discriminator: the rows to forward, and the members that their scores belong to.

A group is one prompt with its N student answers and its teacher answer, N + 1 members, the teacher's last. Members
whose scored tokens are the same are one row: the model sees it once, and its score is one number, whatever rounding
two places in a batch would have given it. n equal answers so get equal rewards, and a student that wrote what the
teacher wrote gets the teacher's score, to the last bit. The gradient is the same sum.

G groups, U distinct rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from verl.batch import student_rows, teacher_rows
from verl.models.packing import AnswerRows, copy_to
from verl.protocol import DataProto
from verl.trainer.ppo.discriminator_algos import PairScores, ends_with_eos, pool_scores, score_mask, with_one_eos

SCORE_NAMES = ("scores", "raw_scores", "score_tokens")


def scored_rows(rows: AnswerRows, eos_token_id: int | Sequence[int], without_eos: torch.Tensor) -> AnswerRows:
    """Rows as the discriminator reads them: the first of several EOS, the tokenizer's first, closes all answers that
    ended (`with_one_eos`), and the mask holds the scored tokens, without that EOS where `without_eos` (R,)."""
    rows = replace(rows, responses=with_one_eos(rows.responses, rows.response_mask, eos_token_id))
    return replace(rows, response_mask=score_mask(rows.responses, rows.response_mask, eos_token_id, without_eos))


class RowScores(NamedTuple):
    """Of R rows: scores, the sums over the same tokens, and how many tokens these are; (R,) each."""

    pooled: torch.Tensor
    raw: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def pool(cls, values: torch.Tensor, mask: torch.Tensor, pooling: str) -> RowScores:
        """From values per token and the mask of the tokens that count, (R, T) each. Scores are where the values are,
        counts where the mask is."""
        counted = copy_to(mask, values.device)
        return cls(pool_scores(values, counted, pooling), pool_scores(values, counted, "sum"), mask.sum(-1))


@dataclass(frozen=True)
class DistinctAnswers:
    """The distinct answers of some groups: `rows` (U, T), and `members` (G, N + 1), the row of each member.

    Rows hold the scored tokens alone. Nothing before a token depends on what follows it, so an EOS that is not scored
    need not be forwarded.
    """

    rows: AnswerRows
    members: torch.Tensor

    @classmethod
    def of(cls, data: DataProto, eos_token_id: int | Sequence[int], exclude_eos: bool) -> DistinctAnswers:
        """From a batch with one row per group.

        Where the teacher's answer was cut, how the students' answers end says nothing about how the teacher would have
        ended: the group is compared without any EOS, whatever `exclude_eos` says.
        """
        groups, answers = data.batch["responses"].shape[:2]
        students, teachers = student_rows(data), teacher_rows(data)
        # Member (g, n) of all rows, students first, as (G, N + 1).
        order = torch.arange(groups * answers).view(groups, answers)
        order = torch.cat([order, groups * answers + torch.arange(groups).unsqueeze(-1)], dim=-1).flatten()
        cut_teacher = ~ends_with_eos(teachers.responses, teachers.response_mask, eos_token_id)
        without_eos = (cut_teacher | exclude_eos).repeat_interleave(answers + 1)
        rows = scored_rows(AnswerRows.join([students, teachers]).select(order), eos_token_id, without_eos)
        texts = rows.responses.masked_fill(rows.response_mask == 0, -1).numpy()

        seen: dict[tuple[int, bytes], int] = {}
        members = [seen.setdefault((i // (answers + 1), text.tobytes()), len(seen)) for i, text in enumerate(texts)]
        members = torch.tensor(members)
        first = torch.full((len(seen),), len(members)).scatter_reduce(0, members, torch.arange(len(members)), "amin")
        return cls(rows.select(first), members.view(groups, answers + 1))

    def lengths(self, share_prompts: bool) -> list[int]:
        """Tokens to forward for each group: its distinct answers', and its prompt's once or for each of these."""
        prompts, answers = self.rows.prompt_mask.sum(-1), self.rows.response_mask.sum(-1)
        distinct = [members.unique() for members in self.members]
        return [
            int(answers[rows].sum() + (prompts[rows[0]] if share_prompts else prompts[rows].sum())) for rows in distinct
        ]

    def select(self, groups: list[int]) -> DistinctAnswers:
        """Some of the groups, with the rows they need."""
        needed, members = self.members[groups].unique(return_inverse=True)
        return DistinctAnswers(self.rows.select(needed), members)

    def scores(self, values: torch.Tensor, pooling: str) -> tuple[PairScores, torch.Tensor]:
        """From values per token of `rows`, (U, T): the members' scores, and their token counts (G, N + 1)."""
        rows, members = RowScores.pool(values, self.rows.response_mask, pooling), copy_to(self.members, values.device)
        pooled, raw = rows.pooled[members], rows.raw[members]
        scores = PairScores(pooled[:, :-1], pooled[:, -1:], raw[:, :-1], raw[:, -1:])
        return scores, rows.tokens.float()[self.members]


class ScoreTable:
    """The scores of a whole batch of G groups with N students each, added micro-batch by micro-batch."""

    def __init__(self, groups: int, answers: int):
        self.groups, self.answers = groups, answers
        self._parts: list[tuple[list[int], dict[str, torch.Tensor]]] = []

    def add(self, groups: list[int], scores: PairScores, tokens: torch.Tensor) -> None:
        """Add the scores of some groups, in their order; they stay on their device."""
        students = (scores.student, scores.student_raw, tokens[:, :-1])
        teachers = (scores.teacher, scores.teacher_raw, tokens[:, -1:])
        sides = {"student": students, "teacher": teachers}
        part = {
            f"{side}_{name}": value.detach()
            for side, values in sides.items()
            for name, value in zip(SCORE_NAMES, values, strict=True)
        }
        self._parts.append((groups, part))

    def tensors(self) -> dict[str, torch.Tensor]:
        """`student_scores` (G, N) and `teacher_scores` (G, 1), the raw sums beside them, and the number of tokens
        that each is pooled over; in host memory."""
        whole = {f"student_{name}": torch.zeros(self.groups, self.answers) for name in SCORE_NAMES}
        whole |= {f"teacher_{name}": torch.zeros(self.groups, 1) for name in SCORE_NAMES}
        for groups, part in self._parts:
            for name, value in part.items():
                whole[name][groups] = value.cpu()
        return whole
