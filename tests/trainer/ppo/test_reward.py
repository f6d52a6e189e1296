"""Rewards of the user's own, and where a score stands in an answer."""

from __future__ import annotations

import os
from copy import deepcopy

import pytest
import torch

from verl.trainer.ppo.reward import TaskReward, on_last_token
from verl.utils.signals import EndedBySignal

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

def beyond_fp32(prompt, answer, teacher):
    return -1e308

def beyond_floats(prompt, answer, teacher):
    return 10**400

def no_number(prompt, answer, teacher):
    return np.str_("high")

def leaves(prompt, answer, teacher):
    exit()

def leaves_well(prompt, answer, teacher):
    import sys
    sys.exit(0)

def interrupts(prompt, answer, teacher):
    raise KeyboardInterrupt

def leaves_at_once(prompt, answer, teacher):
    import os
    try:
        os._exit(0)
    except Exception:
        return 0.0

def changes_its_prompt(prompt, answer, teacher):
    prompt[0]["content"] += "!"
    prompt.append("more")
    return len(prompt) + len(prompt[0]["content"])
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
        (
            "beyond_fp32",
            ValueError,
            r"beyond_fp32, data row 17, answer 0: expected a number that fp32 has, got -1e\+308",
        ),
        ("beyond_floats", ValueError, r"beyond_floats, data row 17, answer 0: .* fp32 has, got 10+: int too large"),
        ("no_number", ValueError, r"no_number, data row 17, answer 0: expected a number"),
        (
            "leaves",
            RuntimeError,
            r"leaves, data row 17, answer 0: raised .* tried to end the process by SystemExit\(None\)",
        ),
        ("leaves_well", RuntimeError, r"row 17, answer 0: raised .* tried to end the process by SystemExit\(0\)"),
        ("interrupts", RuntimeError, r"row 17, answer 0: raised .* tried to end the process by KeyboardInterrupt"),
        ("leaves_at_once", RuntimeError, r"row 17, answer 0: raised .* tried to end the process by os\._exit\(0\)"),
    ],
)
def test_what_goes_wrong_is_said_with_name_and_row(reward, name, error, message):
    with pytest.raises(error, match=message):
        reward(name)(PROMPTS, ANSWERS, TEACHERS, ROWS)


def test_a_reward_that_changes_its_prompt_changes_a_copy(reward):
    prompts = deepcopy(PROMPTS)
    assert reward("changes_its_prompt")(prompts, ANSWERS, TEACHERS, ROWS).tolist() == [[4.0, 4.0], [5.0, 5.0]]
    assert prompts == PROMPTS


def test_a_reward_ends_its_own_children_and_a_signal_still_ends_the_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def forks(p, a, t):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(7)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "def told(p, a, t):\n"
        "    from verl.utils.signals import EndedBySignal\n"
        "    raise EndedBySignal(15)\n"
    )
    before = os._exit
    assert TaskReward(f"{tmp_path}/mine.py:forks")(PROMPTS[:1], ["a"], ["b"], [0]).tolist() == [[7.0]]
    with pytest.raises(EndedBySignal):
        TaskReward(f"{tmp_path}/mine.py:told")(PROMPTS[:1], ["a"], ["b"], [0])
    assert os._exit is before


@pytest.mark.parametrize(
    "way", ["exit()", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"]
)
def test_a_file_that_ends_the_process_when_it_is_run_is_refused(tmp_path, way):
    (tmp_path / "mine.py").write_text(f"{way}\ndef reward(p, a, t): pass\n")
    with pytest.raises(ValueError, match=r"mine.py:reward: running .*mine.py failed .* tried to end the process by"):
        TaskReward(f"{tmp_path}/mine.py:reward")


def test_a_score_stands_on_the_last_token():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
    scores = torch.tensor([[0.5, -2.0], [3.0, 4.0]])
    expected = [[[0, 0.5, 0], [-2.0, 0, 0]], [[0, 0, 3.0], [4.0, 0, 0]]]
    assert on_last_token(scores, mask).tolist() == expected
