"""How a batch travels: one row per prompt, so that a prompt, its teacher answer and its student answers stay together.

Letters of shapes, in every docstring of the package:

    B  prompts of a batch, one row each          N  student answers to a prompt
    P  tokens of a prompt, padded on the left    T  tokens of an answer, padded on the right
    G  groups of a micro-batch: prompts, each with its answers
    R  rows: the sequences that a model sees     U  distinct ones among them
    S  tokens of rows laid end to end            K  answer tokens among them
    D  hidden size                               V  vocabulary
    H  attention heads of size E                 J  key and value heads

The columns of a batch:

    input_ids, attention_mask       (B, P)     the prompt, left-padded
    teacher_response                (B, T)     the teacher's answer, right-padded
    teacher_attention_mask          (B, P+T)   of prompt and answer
    responses, response_mask        (B, N, T)  the student's answers
    critic_input_ids, critic_attention_mask    (B, P')  the prompt in the discriminator's tokens, where these are others
    old_log_probs, ref_log_prob, advantages, ... (B, N, T);  scores (B, N)

A step of training makes records, whose fields are named as the columns are: `Prompts`, `Answers`, `LogProbs`, `Scores`,
`Rewards`. `table` puts the records that a call needs into one table, which travels. At the other end the rows that a
model sees are taken out of it: B*N student rows, or B teacher rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TypeVar

import numpy as np
import torch

from verl.models.packing import AnswerRows
from verl.protocol import DataProto

AnyRecord = TypeVar("AnyRecord", bound="Record")

PROMPT_KEYS = ("input_ids", "attention_mask")
TEACHER_KEYS = ("teacher_response", "teacher_attention_mask")
STUDENT_KEYS = ("responses", "response_mask")
GROUP_KEYS = PROMPT_KEYS + TEACHER_KEYS + STUDENT_KEYS
# The prompt as a discriminator reads it that has a tokenizer of its own; other batches have no such columns.
CRITIC_PROMPT_KEYS = ("critic_input_ids", "critic_attention_mask")
# In a batch's meta_info: the weight of the teachers' answers beside the students' in a policy's update.
ANCHOR_COEF = "sft_anchor_coef"
POLICY_KEYS = ("old_log_probs", "ref_log_prob", "advantages", "rollout_is_weights")
# Of the teacher's answer and of the student's, (B,) each: the reference's log-probs of a preference pair.
PAIR_REFERENCE_KEYS = ("chosen_ref_log_prob", "rejected_ref_log_prob")


class Record:
    """What one part of a step made. A field is None where it was not made."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The columns that it is made of."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls: type[AnyRecord], data: DataProto) -> AnyRecord:
        """From a table's columns of these names; others are left there. ValueError: one that is needed is missing."""
        columns = {**data.batch, **data.non_tensor_batch}
        optional = {field.name for field in fields(cls) if field.default is not MISSING}
        missing = [name for name in cls.names() if name not in columns and name not in optional]
        if missing:
            raise ValueError(
                f"{cls.__name__}: expected the columns {', '.join(cls.names())}, got none named {', '.join(missing)} "
                f"among {', '.join(columns)}; a dataset's rows and its collate_fn have to make them"
            )
        return cls(**{name: columns[name] for name in cls.names() if name in columns})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that can travel."""
        values = {name: getattr(self, name) for name in self.names()}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Prompts(Record):
    """What the data gives: prompts and their teacher answers, in the data's order."""

    input_ids: torch.Tensor  # (B, P)
    attention_mask: torch.Tensor  # (B, P)
    teacher_response: torch.Tensor  # (B, T)
    teacher_attention_mask: torch.Tensor  # (B, P+T)
    index: np.ndarray  # (B,) the rows' numbers in the data
    teacher_text: np.ndarray  # (B,) str
    raw_prompt: np.ndarray | None = None  # (B,) lists of chat messages, where a task reward wants them
    critic_input_ids: torch.Tensor | None = None  # (B, P') in the tokens of a discriminator that has its own
    critic_attention_mask: torch.Tensor | None = None  # (B, P')

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> Prompts:
        """The first so many of them."""
        values = {name: getattr(self, name) for name in self.names()}
        return Prompts(**{name: None if value is None else value[:count] for name, value in values.items()})


@dataclass(frozen=True)
class Answers(Record):
    """What the student wrote; the engine's own log-probs of the answers to a few prompts."""

    responses: torch.Tensor  # (B, N, T)
    response_mask: torch.Tensor  # (B, N, T)
    rollout_log_probs: torch.Tensor | None = None  # (B, N, T)
    rollout_log_probs_mask: torch.Tensor | None = None  # (B,) the prompts that were reported on


@dataclass(frozen=True)
class LogProbs(Record):
    """Of the answers' tokens, under the policy before its update."""

    old_log_probs: torch.Tensor  # (B, N, T)
    entropys: torch.Tensor  # (B, N, T)


@dataclass(frozen=True)
class EngineCorrection(Record):
    """What the policy loss of each token is multiplied by, since the engine drew it and not the policy."""

    rollout_is_weights: torch.Tensor  # (B, N, T)


@dataclass(frozen=True)
class ReferenceLogProbs(Record):
    """The same under the frozen reference."""

    ref_log_prob: torch.Tensor  # (B, N, T)


@dataclass(frozen=True)
class Scores(Record):
    """The discriminator's, before its update: pooled, summed up, and of how many tokens."""

    student_scores: torch.Tensor  # (B, N)
    teacher_scores: torch.Tensor  # (B, 1)
    student_raw_scores: torch.Tensor  # (B, N)
    teacher_raw_scores: torch.Tensor  # (B, 1)
    student_score_tokens: torch.Tensor  # (B, N)
    teacher_score_tokens: torch.Tensor  # (B, 1)


@dataclass(frozen=True)
class Rewards(Record):
    """What the student learns from."""

    token_level_scores: torch.Tensor  # (B, N, T) an answer's reward on its last token
    token_level_rewards: torch.Tensor  # (B, N, T) less the KL penalty
    advantages: torch.Tensor  # (B, N, T)
    returns: torch.Tensor  # (B, N, T)


@dataclass(frozen=True)
class PairLogProbs(Record):
    """The frozen reference's log-probs of preference pairs: the teacher's answer, and the student's."""

    chosen_ref_log_prob: torch.Tensor  # (B,)
    rejected_ref_log_prob: torch.Tensor  # (B,)


def table(*records: Record | None) -> DataProto:
    """The records' tensors side by side; records that are None are skipped."""
    return DataProto.from_dict({k: v for record in records if record is not None for k, v in record.tensors().items()})


def columns(data: DataProto, keys: Sequence[str]) -> DataProto:
    """The tensors of these names that are there; nothing else travels."""
    return data.select([key for key in keys if key in data.batch], non_tensor_batch_keys=[])


def teacher_response_mask(data: DataProto) -> torch.Tensor:
    """(B, T), 1 on the real tokens of the teacher's answers."""
    return data.batch["teacher_attention_mask"][:, -data.batch["teacher_response"].shape[1] :]


def student_rows(data: DataProto) -> AnswerRows:
    """B*N rows, the answers to one prompt next to each other."""
    responses = data.batch["responses"]
    answers = responses.shape[1]
    return AnswerRows(
        prompts=data.batch["input_ids"].repeat_interleave(answers, dim=0),
        prompt_mask=data.batch["attention_mask"].repeat_interleave(answers, dim=0),
        responses=responses.flatten(0, 1),
        response_mask=data.batch["response_mask"].flatten(0, 1),
    )


def teacher_rows(data: DataProto) -> AnswerRows:
    """B rows: the teacher's answer, once per prompt."""
    return AnswerRows(
        prompts=data.batch["input_ids"],
        prompt_mask=data.batch["attention_mask"],
        responses=data.batch["teacher_response"],
        response_mask=teacher_response_mask(data),
    )


@dataclass(frozen=True)
class UpdateRows:
    """The rows of a policy's update, and where they come from.

    rows: R rows; the rows of a prompt stand next to each other.
    student: (R,), which of the batch's B*N student answers a row is; -1 for a teacher's answer.
    """

    rows: AnswerRows
    student: torch.Tensor


def update_rows(data: DataProto, sft: bool, anchor: bool) -> UpdateRows:
    """The teacher's answers (`sft`), or the students', each group with the teacher's answer behind it if `anchor`."""
    if sft:
        rows = teacher_rows(data)
        return UpdateRows(rows, torch.full((len(rows),), -1))
    rows = student_rows(data)
    student = torch.arange(len(rows))
    if not anchor:
        return UpdateRows(rows, student)
    groups = len(data)
    places = torch.cat([student.view(groups, -1), len(rows) + torch.arange(groups).unsqueeze(-1)], dim=-1).flatten()
    joined = AnswerRows.join([rows, teacher_rows(data)]).select(places)
    return UpdateRows(joined, torch.where(places < len(rows), places, -1))


def pair_rows(data: DataProto) -> AnswerRows:
    """2B rows of a batch with one student answer per prompt: a prompt's teacher answer, and after it the student's."""
    prompts = len(data)
    order = torch.arange(2 * prompts).view(2, prompts).T.flatten()
    return AnswerRows.join([teacher_rows(data), student_rows(data)]).select(order)
