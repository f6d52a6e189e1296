"""Families with capped scores, windows, experts and linear attention in all stages, answers by vLLM's CPU build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.recent_stages import gaps

pytestmark = pytest.mark.vllm

# Rounding in bf16; weights that were not pushed would give tenths.
LIMITS = {"float32": 1e-4, "bfloat16": 0.03}


def run(folder: Path, family: str, dtype: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.vllm.recent_stages", str(folder), family, "cpu", dtype]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


# vLLM runs OLMo 3 by transformers' class, of which the discriminator is made after the engine. Its linear attention
# knows bf16 alone on CPU.
@pytest.mark.parametrize(("family", "dtype"), [("gemma2", "float32"), ("olmo3", "float32"), ("qwen3_next", "bfloat16")])
def test_three_stages(family, dtype, tmp_path):
    done = run(tmp_path, family, dtype)
    assert done.returncode == 0, done.stderr[-6000:]
    assert max(gaps(tmp_path)) < LIMITS[dtype]


def test_parameters_that_a_push_does_not_reach_end_the_run(tmp_path):
    """gpt-oss copies experts and sinks itself, which on CPU, where weights are repacked, nobody notices."""
    done = run(tmp_path, "gpt_oss", "float32")
    assert done.returncode == 1
    # In each of two layers the sinks, and of the experts' two projections weights and biases.
    assert "GptOssForCausalLM cannot take pushed weights on this device: 10 parameters got none" in done.stderr
    assert "set actor_rollout_ref.rollout.name=hf" in done.stderr
