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
    old_log_probs, ref_log_prob, advantages, ... (B, N, T);  scores (B, N)

Here the rows that a model sees are taken out of it: B*N student rows, or B teacher rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verl.models.packing import AnswerRows
from verl.protocol import DataProto

PROMPT_KEYS = ("input_ids", "attention_mask")
TEACHER_KEYS = ("teacher_response", "teacher_attention_mask")
STUDENT_KEYS = ("responses", "response_mask")
GROUP_KEYS = PROMPT_KEYS + TEACHER_KEYS + STUDENT_KEYS
# What a run reads of a dataset's row: tensors, then the row's number and texts, the chat messages where it has them.
DATA_KEYS = (*PROMPT_KEYS, *TEACHER_KEYS, "index", "teacher_text", "raw_prompt")
# In a batch's meta_info: the weight of the teachers' answers beside the students' in a policy's update.
ANCHOR_COEF = "sft_anchor_coef"
POLICY_KEYS = ("old_log_probs", "ref_log_prob", "advantages")
# Of the teacher's answer and of the student's, (B,) each: the reference's log-probs of a preference pair.
PAIR_REFERENCE_KEYS = ("chosen_ref_log_prob", "rejected_ref_log_prob")


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
