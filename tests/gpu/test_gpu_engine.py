"""The real engine on a GPU stays in sync with the trainer, in each of its modes, and shows it when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ROLLOUT = "actor_rollout_ref.rollout"
# SeqKD's engine, which this one is, is eager by itself.
COMPILED = f"{ROLLOUT}.enforce_eager=False"
MODES = {
    "sleeping": [COMPILED],
    "sleeping, eager": [f"{ROLLOUT}.enforce_eager=True"],
    "sleeping, fp8 keys": [COMPILED, f"{ROLLOUT}.kv_cache_dtype=fp8"],
    "awake": [COMPILED, f"{ROLLOUT}.free_cache_engine=False"],
    "awake, eager, fp32": [
        f"{ROLLOUT}.free_cache_engine=False",
        f"{ROLLOUT}.enforce_eager=True",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    ],
    "offloaded": [
        "actor_rollout_ref.actor.fsdp_config.param_offload=True",
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
        f"{ROLLOUT}.enforce_eager=True",
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_in_sync(mode, tmp_path):
    command = [sys.executable, "-m", "tests.gpu.engine", str(tmp_path), *MODES[mode]]
    done = subprocess.run(command, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads((tmp_path / "result.json").read_text())
    # bf16's rounding is a few thousandths of a probability, and that of keys and values in fp8, a sixteenth of each, a
    # few hundredths; weights that moved differ by many times that.
    limit = 1e-4 if "fp32" in mode else 0.06 if "fp8" in mode else 5e-3
    for moment in ("first", "pushed", "pushed again"):
        assert seen[moment]["training/rollout_probs_diff_mean"] < limit, seen
    assert seen["same seed"], "the same seed drew other answers"
    assert min(seen["learned"], seen["learned again"]) > 0.9, "the engine does not answer as the policy was taught"
    if "awake" in mode:
        assert seen["left out"]["training/rollout_probs_diff_mean"] > 0.02, seen
    else:
        assert "push_weights" in seen["refused"]
