"""Rewards of the user's own, and where a score stands in an answer."""

from __future__ import annotations

import pytest
import torch

from verl.trainer.ppo.reward import TaskReward, on_last_token

FUNCTIONS = """
import numpy as np
import torch

def longer(prompt, answer, teacher):
    return len(answer) - len(teacher) + 100 * len(prompt)

def as_tensor(prompt, answer, teacher):
    return torch.tensor(float(len(answer)))

def as_array(prompt, answer, teacher):
    return np.float32(len(answer))

def fails_on_b(prompt, answer, teacher):
    return {"a": 1.0}[answer]

def many(prompt, answer, teacher):
    return [1.0, 2.0]

def vector(prompt, answer, teacher):
    return np.zeros(3)

def nothing(prompt, answer, teacher):
    pass

def endless(prompt, answer, teacher):
    return float("inf")
"""
PROMPTS = [[{"role": "user", "content": "q"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]]
ANSWERS, TEACHERS, ROWS = ["a", "天地", "b", ""], ["a", "abc"], [17, 4]


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return lambda name: TaskReward(f"{tmp_path}/mine.py:{name}")


def test_each_answer_is_scored_with_its_prompt_and_its_teacher(reward):
    # Lengths 1, 2 against 1 with one message; 1, 0 against 3 with two.
    assert reward("longer")(PROMPTS, ANSWERS, TEACHERS, ROWS).tolist() == [[100.0, 101.0], [198.0, 197.0]]


@pytest.mark.parametrize("name", ["as_tensor", "as_array"])
def test_scalars_of_any_kind_will_do(reward, name):
    assert reward(name)(PROMPTS, ANSWERS, TEACHERS, ROWS).tolist() == [[1.0, 2.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fails_on_b", RuntimeError, r"fails_on_b, data row 17, answer 1: raised KeyError: '天地'"),
        ("many", TypeError, r"many, data row 17, answer 0: expected one number, got list: \[1.0, 2.0\]"),
        ("vector", TypeError, r"vector, data row 17, answer 0: expected one number, got ndarray of shape \(3,\)"),
        ("nothing", TypeError, r"nothing, .*expected one number, got NoneType"),
        ("endless", ValueError, r"endless, .*expected a finite number, got inf"),
    ],
)
def test_what_goes_wrong_is_said_with_name_and_row(reward, name, error, message):
    with pytest.raises(error, match=message):
        reward(name)(PROMPTS, ANSWERS, TEACHERS, ROWS)


def test_a_score_stands_on_the_last_token():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
    scores = torch.tensor([[0.5, -2.0], [3.0, 4.0]])
    expected = [[[0, 0.5, 0], [-2.0, 0, 0]], [[0, 0, 3.0], [4.0, 0, 0]]]
    assert on_last_token(scores, mask).tolist() == expected
