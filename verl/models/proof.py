"""Proof that a model's values are Hugging Face's own, before it is trained.

Three short rows, two of which share a prompt, go through the model together, each alone, and through the class's plain
`forward().logits`. Whatever a class computes that packing or the head here leaves out or computes otherwise shows as a
difference: attention of its own, windows, sinks, caps and scales of logits, recurrence. No list of families is kept.

There are two proofs. That of a class (`class_verdict`) is made on a small twin (`twin.py`), in fp32 on CPU, from the
config alone, before any process starts, also with windows that are shorter than the rows; it finds how long rows may be
where something is right in short ones only. That of a model (`prove`) is made on its real weights, where and in the
type in which it will train, beyond its window if that is short.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from verl.models.packing import AnswerRows
from verl.models.twin import (
    own_config,
    positions_change_with_length,
    reach_entries,
    sliding_window,
    small_config,
    small_twin,
    special_tokens,
)

logger = logging.getLogger(__name__)

# Tokens of the rows' prompts and answers. The first two have one prompt.
PROMPTS, ANSWERS = (5, 5, 2), (6, 4, 4)
# A reach between the longest row and the shortest: some rows pass it and one does not.
NARROW = 7
WIDE = 64
# Real weights are proved beyond a window of up to so many tokens; longer rows would take long to compare.
SHORT_WINDOW = 1024
# A twin's rows are not made longer than this: beyond 2,048 tokens, at which attention that thins out usually begins to.
LONGEST_TWIN_ROW = 2304
# Largest difference, in spreads of the values. A twin's rounding is near 1e-6; what is left out makes 1e-2 and more.
TWIN_TOLERANCE = 3e-5
# Of real weights. In a half precision the rounding of many layers comes to some hundredths; rows that see each other
# differ by whole spreads. Finer faults are the twin's to find.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
# And in units of what becomes of one rounding of the embeddings: a deep model may make much of little.
ROUNDINGS = 5
TWIN_PARAMETERS = 50_000_000
# Entries of `reach_entries` by what they are.
WINDOW, POSITIONS = re.compile("window|chunk"), re.compile("max_position_embeddings")
# What a forward that does not suit a class may raise. Others, a lack of memory among them, are no verdict on it.
MISFITS = (
    TypeError, ValueError, AttributeError, NotImplementedError, IndexError, KeyError, AssertionError, ImportError,
    RuntimeError,
)  # fmt: skip


class Provable(Protocol):
    """A model as `AnswerModel` wraps it, whose values are to be proved."""

    hf: PreTrainedModel
    remove_padding: bool

    def __init__(self, hf: PreTrainedModel, remove_padding: bool, proven: bool): ...

    def values(self, rows: AnswerRows) -> torch.Tensor:
        """The values (R, T) of the answers' tokens, computed as the model is used."""

    def plain(self, rows: AnswerRows, noise: float = 0.0) -> torch.Tensor:
        """The same values from the class's own forward, row by row; `noise` disturbs the embeddings, relatively."""

    def padded(self) -> AbstractContextManager[None]:
        """Pad rows within the block instead of packing them."""


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a class: its fault, if it has one; the most tokens of a row, and why; and whether it was
    compared at all."""

    fault: str | None = None
    longest: int | None = None
    reason: str = ""
    compared: bool = True


class NoVerdict(Exception):
    """There is no twin, or the plain forward itself did not work, so that there is nothing to compare with."""

    def __init__(self, problem: str, in_forward: bool = False):
        super().__init__(problem)
        self.in_forward = in_forward


def proof_rows(config: PretrainedConfig, longest: int | None = None, shared: int = PROMPTS[0]) -> AnswerRows:
    """The three rows, of ordinary tokens from all over the vocabulary. The prompt of two of them has `shared` tokens;
    with `longest` the first row has a prompt of its own and so many tokens."""
    vocabulary, special = config.get_text_config().vocab_size, special_tokens(config)
    lengths = (shared, PROMPTS[2], longest - ANSWERS[0] if longest else 0, *ANSWERS)
    ordinary = [token for token in range(2, vocabulary, max(1, vocabulary // 100)) if token not in special]
    tokens = torch.tensor(ordinary)[7 * torch.arange(sum(lengths)) % len(ordinary)]
    first, third, long, *answers = tokens.split(lengths)
    prompts = [long if longest else first, first, third]
    return AnswerRows.of_tokens(prompts, answers)


# ---------------------------------------------------------------------------------------------------------------------
# A class, by its twin


def class_verdict(
    head: type[Provable],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    remove_padding: bool,
    longest: int | None = None,
) -> Verdict:
    """The verdict on models of this class and config, with their rows packed or padded, as `head` uses them.

    A config that has no small twin, or whose twin's own forward fails, gets no fault: the proof on the real weights
    decides over it. Packed rows then keep within the smallest window that it names.

    A folder's config may be that of a model of pictures and text, and the class that of its text alone; the class is
    then compared by its own part of the config.

    Args:
        longest: of a run's rows, in tokens. Where it is given, packed rows of that length are compared too, so that
            attention which thins out with length shows whatever its config calls it.
    """
    config = own_config(model_class, config)
    verdict = _verdict(head, model_class, _Config(config), remove_padding)
    if longest is None or not remove_padding or not verdict.compared or verdict.fault is not None:
        return verdict
    tokens = min(longest, LONGEST_TWIN_ROW)
    if tokens <= PROMPTS[0] + ANSWERS[0] or tokens > (verdict.longest or tokens):
        return verdict
    try:
        fault = _twin_fault(head, model_class, config, remove_padding, {}, tokens)
    except NoVerdict:
        return verdict
    return verdict if fault is None else Verdict(f"of rows of {tokens} tokens, {fault}")


class _Config:
    """A config, equal to any other with the same entries."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self.entries = config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.entries == other.entries


@cache
def _verdict(head, model_class, wrapped: _Config, remove_padding: bool) -> Verdict:
    config = wrapped.config
    reach = reach_entries(config)
    # Packed rows might lose their window; positions that follow the longest row are so for padded rows too.
    relevant = {key for key in reach if WINDOW.search(key)} if remove_padding else set()
    if positions_change_with_length(config):
        relevant |= {key for key in reach if POSITIONS.search(key)}
    wide = {key: WIDE for key, value in reach.items() if value < WIDE}
    try:
        fault = _twin_fault(head, model_class, config, remove_padding, wide)
    except NoVerdict as error:
        if error.in_forward and (isinstance(error.__cause__, TypeError) or config.is_encoder_decoder):
            # No matter of sizes: the model itself will do the same.
            return Verdict(f"Hugging Face's own forward, given tokens alone, fails: {error}")
        logger.info(
            "%s has no small twin that works (%s): it is proved on its own weights", model_class.__name__, error
        )
        certain = {key: reach[key] for key in relevant if "chunk" not in key or key == "attention_chunk_size"}
        return _limited(certain, compared=False)
    if fault is not None:
        return Verdict(fault)
    matters = {}
    for key in relevant:
        try:
            if _twin_fault(head, model_class, config, remove_padding, {**wide, key: NARROW}) is not None:
                matters[key] = reach[key]
        except NoVerdict:
            # A table of positions ends there, for Hugging Face as well.
            continue
    return _limited(matters)


def _limited(reach: dict[str, int], compared: bool = True) -> Verdict:
    if not reach:
        return Verdict(compared=compared)
    key = min(reach, key=reach.__getitem__)
    return Verdict(longest=reach[key], reason=f"{key}={reach[key]}", compared=compared)


def _twin_fault(
    head: type[Provable],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    remove_padding: bool,
    changes: dict[str, int],
    longest: int | None = None,
) -> str | None:
    """The fault of the twin, in a few words, or None. NoVerdict where there is no twin that works."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(small_config(config, changes)).parameters())
        if size > TWIN_PARAMETERS:
            raise NoVerdict(f"{size} parameters")
        twin = small_twin(model_class, config, changes)
        rows = proof_rows(twin.config, longest)
    except Exception as error:
        # Sizes that do not fit together fail in any way.
        raise NoVerdict(_first_line(error)) from error
    try:
        model = head(twin, remove_padding, proven=True)
    except MISFITS as error:
        return _first_line(error)
    return _fault(model, rows, torch.max, lambda plain: TWIN_TOLERANCE, thorough=longest is None)


def check_class(
    head: type[Provable],
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    remove_padding: bool,
    longest: int | None = None,
) -> Verdict:
    """`class_verdict`.

    Raises:
        ValueError: something is wrong with the class, or rows may get longer than it is right for; names the class and
            the way out.
    """
    verdict = class_verdict(head, model_class, config, remove_padding, longest)
    fault = verdict.fault
    if longest is not None and verdict.longest is not None and longest > verdict.longest:
        fault = too_long(verdict, longest)
    if fault is not None:
        padded = class_verdict(head, model_class, config, remove_padding=False)
        reaches = longest is None or padded.longest is None or longest <= padded.longest
        raise ValueError(refusal(model_class, remove_padding, fault, padded.compared and not padded.fault and reaches))
    return verdict


def too_long(verdict: Verdict, tokens: int) -> str:
    """The fault of rows with more tokens than the class is right for."""
    return (
        f"its rows depend on what is beside them, or lose their window, beyond {verdict.longest} tokens "
        f"({verdict.reason}), and rows may have {tokens} (max_prompt_length + max_response_length)"
    )


def refusal(model_class: type[PreTrainedModel], remove_padding: bool, fault: str, padded_is_right: bool) -> str:
    """Why a model cannot be used, and the way out. Padding is offered where it was compared and is right."""
    how = "packed rows" if remove_padding else "padded rows (use_remove_padding=False)"
    other = "another model (docs/models.md lists the families)"
    if padded_is_right and remove_padding:
        other = f"use_remove_padding=False, which was compared and is right, or {other}"
    return f"{model_class.__name__} cannot be used with {how}: {fault}; use {other}"


# ---------------------------------------------------------------------------------------------------------------------
# A model, on its own weights


def prove(model: Provable, dtype: torch.dtype) -> None:
    """Compare the model's values with its class's plain forward; collective where it is sharded.

    Args:
        dtype: what it computes in.

    Raises:
        ValueError: they differ by more than rounding, or cannot be computed; names the class and the way out.
    """
    window = sliding_window(model.hf.config)
    rows = proof_rows(model.hf.config, shared=max(PROMPTS[0], window if window <= SHORT_WINDOW else 0))

    def tolerance(plain: torch.Tensor) -> float:
        rounding = _error(model.plain(rows, torch.finfo(dtype).eps), plain, rows.response_mask, torch.median)
        return max(TOLERANCES[dtype], ROUNDINGS * rounding)

    try:
        fault = _fault(model, rows, torch.median, tolerance)
        if fault is None:
            return
        padded_is_right = False
        if model.remove_padding:
            with model.padded():
                padded_is_right = _fault(model, rows, torch.median, tolerance) is None
    except NoVerdict as error:
        raise ValueError(
            f"Hugging Face's own forward of {type(model.hf).__name__} fails ({error}), so that nothing can be compared "
            "with it; use another model"
        ) from error
    raise ValueError(refusal(type(model.hf), model.remove_padding, fault, padded_is_right))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing

# Of a row's differences, the one that counts.
Pick = Callable[[torch.Tensor], torch.Tensor]


def _fault(
    model: Provable,
    rows: AnswerRows,
    pick: Pick,
    tolerance: Callable[[torch.Tensor], float],
    thorough: bool = True,
) -> str | None:
    """The fault of the model's values, in a few words, or None.

    Args:
        pick: see `_error`.
        tolerance: the largest difference allowed in it, given the plain values.
        thorough: look at each row alone too, and whether tokens are independent of what follows them.

    Raises:
        NoVerdict: the plain forward fails.
    """
    begun_rows = _without_last(rows)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            plain = model.plain(rows)
            begun = model.plain(begun_rows) if thorough else plain
            allowed = tolerance(plain)
        except MISFITS as error:
            _check_device(error)
            raise NoVerdict(_first_line(error), in_forward=True) from error
        if not _error(begun, plain, begun_rows.response_mask, pick) <= allowed:
            return "its values depend on tokens that come later, so it is no causal language model"
        try:
            together = model.values(rows)
            alone = [model.values(rows.select([row])) for row in range(len(rows))] if thorough else [together]
        except MISFITS as error:
            _check_device(error)
            return _first_line(error)
    for values, fault in (
        (torch.cat(alone), "its values differ from those of Hugging Face's own forward"),
        (together, "rows beside each other change each other's values"),
    ):
        error = _error(values, plain, rows.response_mask, pick)
        if not error <= allowed:
            return f"{fault}, by {error:.2g} of their spread"
    return None


def _check_device(error: BaseException) -> None:
    """A lack of memory and a failed device are no verdict on a model."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else ""
    return text if isinstance(error, ValueError) else f"it fails with {type(error).__name__}: {text}"


def _without_last(rows: AnswerRows) -> AnswerRows:
    """Rows that end one token earlier."""
    counts = rows.response_mask.sum(-1, keepdim=True) - 1
    mask = (torch.arange(rows.response_mask.shape[1]) < counts).long()
    return AnswerRows(rows.prompts, rows.prompt_mask, rows.responses * mask, mask)


def _error(values: torch.Tensor, plain: torch.Tensor, mask: torch.Tensor, pick: Pick) -> float:
    """The worst row's difference between values (R, T), in spreads of the plain ones.

    Of a row's tokens `pick` takes the largest difference or, where rounding may send single tokens to another expert,
    the median: a fault is in every token of some row.
    """
    real = mask.bool()
    distance = (values - plain).abs().cpu() / plain[real].std().cpu().clamp(min=1e-6)
    distance = distance.nan_to_num(nan=float("inf"))
    return max(pick(row[kept]).item() for row, kept in zip(distance, real, strict=True))
