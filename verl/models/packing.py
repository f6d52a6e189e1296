"""Rows of prompt + answer, and how they are laid end to end so that no padding is computed.

R rows, P prompt width (left-padded), T answer width (right-padded), S real tokens of all rows together,
K real answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AnswerRows:
    """Prompts (R, P) and answers (R, T) with their masks; a row is one sequence of the model."""

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    responses: torch.Tensor
    response_mask: torch.Tensor

    def __len__(self) -> int:
        return self.prompts.shape[0]

    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return (self.prompt_mask.sum(-1) + self.response_mask.sum(-1)).tolist()

    def select(self, rows: torch.Tensor | list[int]) -> AnswerRows:
        """The given rows, in the given order."""
        return AnswerRows(self.prompts[rows], self.prompt_mask[rows], self.responses[rows], self.response_mask[rows])

    @classmethod
    def join(cls, parts: list[AnswerRows]) -> AnswerRows:
        """Rows of several parts of equal widths, one after the other."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("prompts", "prompt_mask", "responses", "response_mask")
            )
        )


@dataclass(frozen=True)
class PackedRows:
    """Rows laid end to end.

    input_ids, position_ids: (1, S); positions count from 0 in every row.
    pad_index: (S,) where a token sits in the right-padded (R * longest) grid, for attention.
    answer_index: (K,) where the answer tokens sit in S, row after row; the token before each one predicts it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pad_index: torch.Tensor
    answer_index: torch.Tensor
    rows: int
    longest: int


def pack(rows: AnswerRows) -> PackedRows:
    """Lay rows end to end.

    Raises:
        ValueError: a row without a prompt token: its first answer token could not be predicted.
    """
    if not rows.prompt_mask.any(-1).all():
        empty = (~rows.prompt_mask.bool().any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"every row needs at least one prompt token; rows {empty[:10]} have none")
    mask = torch.cat([rows.prompt_mask, rows.response_mask], dim=-1).bool()
    ids = torch.cat([rows.prompts, rows.responses], dim=-1)
    count, prompt_width = rows.prompts.shape

    position = mask.cumsum(-1) - 1
    longest = int(mask.sum(-1).max())
    row = torch.arange(count, device=ids.device).unsqueeze(-1)
    flat_index = mask.flatten().cumsum(0).view_as(mask) - 1
    return PackedRows(
        input_ids=ids[mask].unsqueeze(0),
        position_ids=position[mask].unsqueeze(0),
        pad_index=(row * longest + position)[mask],
        answer_index=flat_index[:, prompt_width:][rows.response_mask.bool()],
        rows=count,
        longest=longest,
    )
