"""The driver's handle on the student: when the engine gets weights, and what a call carries; the workers are played."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.workers.updates_setup import PROMPTS, batch
from verl.batch import PROMPT_KEYS, TEACHER_KEYS, Answers, Prompts
from verl.protocol import DataProto
from verl.trainer.config import compose_config
from verl.trainer.ppo.student import Student


class Workers:
    """Notes the calls, in their order."""

    def __init__(self):
        self.calls = []

    def push_weights(self):
        self.calls.append("push")

    def generate_sequences(self, rows):
        self.calls.append("generate")
        answers = torch.ones(len(rows), 2, 3, dtype=torch.long)
        return DataProto.from_dict({"responses": answers, "response_mask": answers})

    def update_actor(self, rows):
        self.calls.append("update")
        self.columns = set(rows.batch.keys())
        return [{"actor/loss": 1.0}]


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def prompts():
    data = batch()
    names = {"index": np.arange(PROMPTS), "teacher_text": np.full(PROMPTS, "")}
    return Prompts(**{key: data.batch[key] for key in PROMPT_KEYS + TEACHER_KEYS}, **names)


def student_of(workers, *overrides):
    settings = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    settings += [f"data.train_batch_size={PROMPTS}", "trainer.device=cpu", *overrides]
    return Student(compose_config(settings), workers, tokenizer=None, eos_token_ids=(1,))


def test_the_engine_gets_weights_once_after_every_change(workers, prompts):
    student = student_of(workers)
    student.answer(prompts, 0)
    student.answer(prompts, 1)
    student.imitate(prompts)
    student.answer(prompts, 2)
    student.weights_changed()  # as by a checkpoint that was loaded
    student.answer(prompts, 3)
    assert workers.calls == [
        *("push", "generate", "generate"),
        *("update", "push", "generate"),
        *("push", "generate"),
    ]


def test_an_update_on_the_teachers_answers_is_sent_nothing_else(workers, prompts):
    assert student_of(workers).imitate(prompts) == {"actor/loss": 1.0}
    assert workers.columns == {*PROMPT_KEYS, *TEACHER_KEYS}


def test_columns_that_a_record_needs_are_named(prompts):
    with pytest.raises(
        ValueError, match=r"Answers: expected the columns responses, response_mask.*none named responses"
    ):
        Answers.of(DataProto.from_dict({"input_ids": prompts.input_ids, "response_mask": prompts.input_ids}))
