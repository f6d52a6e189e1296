"""Rows of prompt + answer, and how they are laid end to end so that nothing is computed twice or in vain.

R rows, P prompt tokens (left-padded), T answer tokens (right-padded), S tokens to compute, K answer tokens among them.

Padding is not computed, and a prompt is computed once for all answers to it that stand next to each other: nothing in
a prompt depends on what follows it. A *family* is such a run of rows; each of its answers continues the one prompt. The
prompts of families of several rows are laid down first, then their answers, then the other rows, whole.

Rows stay in host memory, and their layout is worked out there: on a GPU the index arithmetic would make the host wait
for the device at every micro-batch. What the model needs is then copied over without waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from verl.models.sequence_parallel import Shard


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

    def unpadded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each row's prompt and answer without their padding."""
        for prompt, prompt_mask, answer, mask in zip(
            self.prompts, self.prompt_mask.bool(), self.responses, self.response_mask.bool(), strict=True
        ):
            yield prompt[prompt_mask], answer[mask]

    def begins_family(self) -> torch.Tensor:
        """(R,) bool: whether a row's prompt is another one than that of the row before it."""
        same = (self.prompts[1:] == self.prompts[:-1]) & (self.prompt_mask[1:] == self.prompt_mask[:-1])
        return torch.cat([torch.ones(min(1, len(self)), dtype=torch.bool), ~same.all(-1)])

    def shared_prompts(self) -> list[int]:
        """Tokens of each row's prompt if the row before it has the same one, else 0."""
        return (self.prompt_mask.sum(-1) * ~self.begins_family()).tolist()

    def select(self, rows: torch.Tensor | list[int]) -> AnswerRows:
        """The given rows, in the given order."""
        return AnswerRows(self.prompts[rows], self.prompt_mask[rows], self.responses[rows], self.response_mask[rows])

    @classmethod
    def of_tokens(
        cls, prompts: Sequence[Sequence[int] | torch.Tensor], answers: Sequence[Sequence[int] | torch.Tensor]
    ) -> AnswerRows:
        """Rows of R prompts and R answers without padding."""
        return cls(*padded(prompts, left=True), *padded(answers, left=False))

    @classmethod
    def join(cls, parts: list[AnswerRows]) -> AnswerRows:
        """Rows of several parts of equal widths, one after the other."""
        return cls(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("prompts", "prompt_mask", "responses", "response_mask")
            )
        )


def padded(tokens: Sequence[Sequence[int] | torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids as one tensor (R, longest), padded with 0 on the left or on the right, and its mask."""
    width = max(map(len, tokens))
    ids, mask = torch.zeros(2, len(tokens), width, dtype=torch.long)
    for row, values in enumerate(tokens):
        place = slice(width - len(values), None) if left else slice(len(values))
        ids[row, place], mask[row, place] = torch.as_tensor(values), 1
    return ids, mask


@dataclass(frozen=True)
class PackedRows:
    """Rows laid end to end.

    input_ids, position_ids: (1, S); positions count on from the prompt in every answer.
    answer_index: (K,) where the answer tokens sit in S, row after row.
    before_index: (K,) where the token before each of them sits, which predicts it.
    answer_ids: (K,) the answer tokens.
    grid_index: (K,) where they sit in the flattened (R * T) answers.
    layout: the form in which attention needs them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    answer_index: torch.Tensor
    before_index: torch.Tensor
    answer_ids: torch.Tensor
    grid_index: torch.Tensor
    layout: Layout

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on another device."""
        return _copy_tensors(replace(self, layout=_copy_tensors(self.layout, device)), device)

    def of(self, shard: Shard, before: bool) -> PackedRows:
        """The tokens of one rank's shard, and the answer tokens that are computed there: those that sit in it or, with
        `before`, whose token before sits in it. Indices are places in the shard; the other index is empty. The layout
        is that of all tokens."""
        index = self.before_index if before else self.answer_index
        held = shard.holds(index)
        own, none = shard.place(index[held]), index[:0]
        return PackedRows(
            input_ids=shard.of(self.input_ids[0]).unsqueeze(0),
            position_ids=shard.of(self.position_ids[0]).unsqueeze(0),
            answer_index=none if before else own,
            before_index=own if before else none,
            answer_ids=self.answer_ids[held],
            grid_index=self.grid_index[held],
            layout=replace(self.layout, shard=shard),
        )


@dataclass(frozen=True)
class Layout:
    """The tokens of S that each token attends to, in two forms.

    As segments, each of which is causal in itself: the prompts of families of several rows, then their answers, then
    the other rows. Such answers attend to their family's prompt besides:

        starts: (segments + 1,) int32, where each begins in S, and S itself; longest: tokens of the longest.
        prompt_tokens, answer_tokens: tokens of the first section and of the second.
        prompt_starts, answer_starts: (families + 1,) int32, where each family's prompt begins in the first section, and
            its answers in the second, and the section's end.
        longest_prompt, longest_answers: tokens of the longest prompt, and of the largest family's answers together.

    In layers in which a token attends to the last `window` tokens alone, itself among them, the keys of each segment:

        window: tokens of the window that the rows were packed for; 0 where no row reaches it.
        window_keys: (keys,) which token of S each is. Before an answer's own come the last of its prompt, as many as
            its first token sees. Empty without a window, or where no prompt is shared: then the keys are the tokens.
        window_starts: (segments + 1,) int32, where each segment's begin; longest_window: the most of one segment.

    As a grid, (rows * width), in which every row is causal in itself:

        source: (rows * width,) which token of S stands in a cell; 0 in the padding behind a row.
        place: (S,) the cell in which a token's result stands.

    shard: of the S tokens, those that the model's forward is of; None: all of them.
    """

    starts: torch.Tensor
    longest: int
    prompt_tokens: int
    prompt_starts: torch.Tensor
    longest_prompt: int
    answer_tokens: int
    answer_starts: torch.Tensor
    longest_answers: int
    window: int
    window_keys: torch.Tensor
    window_starts: torch.Tensor
    longest_window: int
    source: torch.Tensor
    place: torch.Tensor
    rows: int
    width: int
    shard: Shard | None = None

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.place)

    def arguments(self) -> dict[str, torch.Tensor | int | Shard | None]:
        """Its fields, as they travel through a model's forward to `packed_attention`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _copy_tensors(record, device: torch.device):
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{k: copy_to(v, device) for k, v in values.items() if isinstance(v, torch.Tensor)})


def pack(rows: AnswerRows, window: int = 0) -> PackedRows:
    """Lay rows end to end.

    Args:
        window: tokens that a token attends to, itself among them, in layers with a sliding window; 0: there are none.

    Raises:
        ValueError: a row without a prompt token: its first answer token could not be predicted; or padding between
            tokens.
    """
    first, prompts, answers = _extents(rows)
    count, before, after = len(rows), rows.prompts.shape[1], rows.responses.shape[1]
    begins = rows.begins_family()
    family = begins.long().cumsum(0) - 1
    leader = begins.nonzero().flatten()[family]
    shared = (torch.bincount(family) > 1)[family]

    # Runs of tokens, section by section, one for each row in each: where they begin in S, and in what is laid down.
    counts = [prompts * (shared & begins), answers * shared, (prompts + answers) * ~shared]
    lengths, row, none = torch.cat(counts), torch.arange(count), torch.zeros_like(prompts)
    in_prompts, in_answers, in_others = (lengths.cumsum(0) - lengths).view(3, count)
    prompt_at = torch.where(shared, in_prompts[leader], in_others)
    answer_at = torch.where(shared, in_answers, in_others + prompts)
    cells, positions = torch.stack([first, none + before, first]), torch.stack([none, prompts, none])

    answer_index = _ranges(answer_at, answers)
    # What stands before an answer's first token is its prompt's last, which may be laid down elsewhere.
    before_index, real = answer_index - 1, answers > 0
    before_index[(answers.cumsum(0) - answers)[real]] = (prompt_at + prompts - 1)[real]
    grid_index = _ranges(row * after, answers)
    ids = torch.cat([rows.prompts, rows.responses], dim=-1).flatten()
    width = int((prompts + answers).max())
    window = window if window < width else 0
    return PackedRows(
        input_ids=ids[_ranges((cells + row * (before + after)).flatten(), lengths)].unsqueeze(0),
        position_ids=_ranges(positions.flatten(), lengths).unsqueeze(0),
        answer_index=answer_index,
        before_index=before_index,
        answer_ids=rows.responses.flatten()[grid_index],
        grid_index=grid_index,
        layout=Layout(
            **_segments(*counts, family),
            **_windowed(*counts, family, window),
            source=_source(prompts, answers, prompt_at, answer_at, width),
            place=_ranges((positions + row * width).flatten(), lengths),
            rows=count,
            width=width,
        ),
    )


def _extents(rows: AnswerRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(R,) each: the column of a row's first token, the tokens of its prompt, and those of its answer.

    Raises:
        ValueError: see `pack`.
    """
    mask = torch.cat([rows.prompt_mask.bool(), rows.response_mask.bool()], dim=-1)
    prompts, tokens = mask[:, : rows.prompts.shape[1]].count_nonzero(-1), mask.count_nonzero(-1)
    if not prompts.all():
        empty = (prompts == 0).nonzero().flatten().tolist()
        raise ValueError(f"every row needs at least one prompt token; rows {empty[:10]} have none")
    numbers = mask.byte()
    first, end = numbers.argmax(-1), mask.shape[1] - numbers.flip(-1).argmax(-1)
    gaps = end - first != tokens
    if gaps.any():
        raise ValueError(
            "a row's tokens must follow each other, prompts left-padded and answers right-padded; rows "
            f"{gaps.nonzero().flatten().tolist()[:10]} have padding between tokens"
        )
    return first, prompts, tokens - prompts


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """For each start the numbers from it on, as many as its length says, one run after the other."""
    ends = lengths.cumsum(0)
    total = int(ends[-1])
    return torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=total).add_(torch.arange(total))


def _segments(prompts: torch.Tensor, answers: torch.Tensor, others: torch.Tensor, family: torch.Tensor) -> dict:
    """The fields of a layout as segments, from each row's tokens in each section, (R,), and its family's number,
    (R,)."""
    lengths = torch.cat([prompts, answers, others])
    lengths = lengths[lengths > 0]
    per_family = torch.zeros(2, int(family[-1]) + 1, dtype=torch.long)
    per_family.index_add_(1, family, torch.stack([prompts, answers]))
    family_prompts, family_answers = per_family[:, per_family[0] > 0]
    return {
        "starts": _starts(lengths),
        "longest": int(lengths.max()),
        "prompt_tokens": int(family_prompts.sum()),
        "prompt_starts": _starts(family_prompts),
        "longest_prompt": max(family_prompts.tolist(), default=0),
        "answer_tokens": int(family_answers.sum()),
        "answer_starts": _starts(family_answers),
        "longest_answers": max(family_answers.tolist(), default=0),
    }


def _windowed(
    prompts: torch.Tensor, answers: torch.Tensor, others: torch.Tensor, family: torch.Tensor, window: int
) -> dict:
    """The fields of a layout for layers with a window, from what `_segments` has; `window` is 0 where none is reached.

    The prompt's tokens that an answer's first token sees are right before the answer's own, so that one causal call,
    its last query at its last key, is attention as in a row of its own.
    """
    nothing = {"window_keys": torch.zeros(0, dtype=torch.long), "window_starts": _starts(answers[:0])}
    if not window or not answers.any():
        return {"window": window, **nothing, "longest_window": 0}
    prompt_tokens = torch.zeros_like(prompts).index_add(0, family, prompts)
    prompt_ends = prompt_tokens.cumsum(0)[family]
    seen = prompt_tokens[family].clamp(max=window - 1)
    lengths = torch.cat([prompts, answers, others])
    real = lengths > 0
    before = torch.cat([torch.zeros_like(prompts), seen, torch.zeros_like(others)])[real]
    ends = prompt_ends.repeat(3)[real]
    begins, keys = _starts(lengths[real])[:-1].long(), lengths[real] + before
    starts = _starts(keys)
    segment = torch.repeat_interleave(torch.arange(len(keys)), keys)
    place = torch.arange(int(keys.sum())) - starts[:-1].long()[segment] - before[segment]
    index = torch.where(place < 0, ends[segment] + place, begins[segment] + place)
    return {
        "window": window,
        "window_keys": index,
        "window_starts": starts,
        "longest_window": int(keys.max()),
    }


def _source(
    prompts: torch.Tensor, answers: torch.Tensor, prompt_at: torch.Tensor, answer_at: torch.Tensor, width: int
) -> torch.Tensor:
    """The `source` of a layout as a grid, from the tokens of each row's prompt and answer and where they begin in S."""
    # Numbers of the padding are all below 0.
    starts = torch.stack([prompt_at, answer_at, torch.full_like(prompts, -width)], dim=-1)
    lengths = torch.stack([prompts, answers, width - prompts - answers], dim=-1)
    return _ranges(starts.flatten(), lengths.flatten()).clamp_(min=0)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
