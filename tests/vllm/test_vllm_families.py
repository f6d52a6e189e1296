"""Families whose tensors vLLM knows under other names than transformers keeps them, or has no code of its own for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.family_engine import FAMILIES, LENGTHS

pytestmark = pytest.mark.vllm


# Its attention (MLA) the CPU build computes otherwise than transformers does, from a folder too.
UNLIKE_TRANSFORMERS = {"deepseek_v3"}


def run(what: str, family: str, **variables: str):
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "tests.vllm.family_engine", what, family]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - UNLIKE_TRANSFORMERS))
def test_answers_are_those_of_the_model_after_every_push(family):
    for rows, difference, _ in run("pushed", family):
        assert rows == len(LENGTHS)
        assert difference < 1e-3


@pytest.mark.parametrize("family", sorted(UNLIKE_TRANSFORMERS))
def test_answers_after_a_push_are_those_of_an_engine_that_read_the_model(family):
    (_, _, first), (_, _, second) = run("pushed", family)
    assert first == run("loaded", family)
    assert first != second


def test_no_process_is_started_to_look_at_a_class(tmp_path):
    """vLLM keeps what it saw of a class in such a process, so that the next start need not have one."""
    run("pushed", "mixtral", VLLM_CACHE_ROOT=str(tmp_path))
    assert (tmp_path / "verl_models").is_dir()
    assert not (tmp_path / "modelinfos").exists()
