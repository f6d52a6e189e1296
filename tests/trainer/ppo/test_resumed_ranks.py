"""A run that goes on with another number of ranks says what that changes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from verl.trainer.config import compose_config
from verl.trainer.ppo.checkpointing import Checkpoints, RunState
from verl.utils.checkpoint.checkpoint_manager import commit_checkpoint, start_checkpoint


class Ranks:
    """Workers that have nothing to load."""

    def __init__(self, world_size: int):
        self.world_size = world_size

    def load_checkpoint(self, folder: str) -> None:
        assert folder.endswith("actor")


@pytest.mark.parametrize(("written", "ranks"), [(2, 2), (2, 8), (8, 1)])
def test_another_number_of_ranks_is_warned_of(tmp_path, caplog, written, ranks):
    folder = start_checkpoint(tmp_path, 3)
    (folder / "actor").mkdir()
    (folder / "actor" / "fsdp_config.json").write_text(json.dumps({"world_size": written}))
    state = RunState(global_step=3, samples_seen=12, kl_coef=0.1)
    (folder / "trainer_state.json").write_text(json.dumps(asdict(state)))
    required = ["data.train_files=x", "actor_rollout_ref.model.path=x", "trainer.experiment_name=x"]
    config = compose_config([*required, f"trainer.default_local_dir={tmp_path}"]).trainer
    assert Checkpoints(config, Ranks(ranks), None, {}).load(commit_checkpoint(folder)) == state
    warned = f"was written by {written} ranks, and this run has {ranks}: weights, optimizers" in caplog.text
    assert warned == (written != ranks)
