"""Rows of prompt + answer, and how they are laid end to end so that no padding is computed.

R rows, P prompt width (left-padded), T answer width (right-padded), S real tokens of all rows together,
K real answer tokens.

Rows stay in host memory, and their layout is worked out there: on a GPU the index arithmetic would make the host wait
for the device at every micro-batch. What the model needs is then copied over without waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the host does not wait for a copy to a GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
    starts: (R + 1,) int32, where each row begins in S, and S itself.
    pad_index: (S,) where a token sits in the right-padded (R * longest) grid.
    answer_index: (K,) where the answer tokens sit in S, row after row; the token before each one predicts it.
    answer_ids: (K,) the answer tokens.
    grid_index: (K,) where they sit in the flattened (R * T) answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    starts: torch.Tensor
    pad_index: torch.Tensor
    answer_index: torch.Tensor
    answer_ids: torch.Tensor
    grid_index: torch.Tensor
    rows: int
    longest: int

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: copy_to(value, device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def layout(self) -> dict[str, torch.Tensor | int]:
        """What `packed_attention` has to know of the rows."""
        return {"starts": self.starts, "pad_index": self.pad_index, "rows": self.rows, "longest": self.longest}


def pack(rows: AnswerRows) -> PackedRows:
    """Lay rows end to end.

    Raises:
        ValueError: a row without a prompt token: its first answer token could not be predicted.
    """
    if not rows.prompt_mask.any(-1).all():
        empty = (~rows.prompt_mask.bool().any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"every row needs at least one prompt token; rows {empty[:10]} have none")
    answer_mask = rows.response_mask.bool()
    mask = torch.cat([rows.prompt_mask.bool(), answer_mask], dim=-1)
    ids = torch.cat([rows.prompts, rows.responses], dim=-1)
    count, prompt_width = rows.prompts.shape

    position = mask.cumsum(-1) - 1
    lengths = mask.sum(-1)
    longest = int(lengths.max())
    row = torch.arange(count).unsqueeze(-1)
    flat_index = mask.flatten().cumsum(0).view_as(mask) - 1
    return PackedRows(
        input_ids=ids[mask].unsqueeze(0),
        position_ids=position[mask].unsqueeze(0),
        starts=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        pad_index=(row * longest + position)[mask],
        answer_index=flat_index[:, prompt_width:][answer_mask],
        answer_ids=rows.responses[answer_mask],
        grid_index=answer_mask.flatten().nonzero().flatten(),
        rows=count,
        longest=longest,
    )
