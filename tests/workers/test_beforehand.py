"""What a rank's process does before its workers are known: which models it reads, and whether it loads an engine."""

from __future__ import annotations

import pickle

import pytest

from verl.trainer.config import compose_config
from verl.trainer.main_ppo import TaskRunner
from verl.trainer.ppo.roles import Role
from verl.utils import startup
from verl.workers import beforehand

NEEDED = (
    "trainer.experiment_name=x", "data.train_files=/d", "actor_rollout_ref.model.path=/student", "trainer.device=cpu",
)  # fmt: skip
GAD = ("stage=gad", "critic.model.path=/critic")
AHEAD = ("trainer.rollout_ahead=1", "actor_rollout_ref.rollout.n_gpus_per_node=1")
# Generates nothing.
SEQKD = ("stage=seqkd", "trainer.val_before_train=False", "trainer.test_freq=-1")


@pytest.fixture
def prepare(monkeypatch):
    """`prepare(rank, *settings)`: what is read ahead (None: nothing), which engine is loaded, the phases."""
    monkeypatch.setattr(startup, "_record", startup._Record())
    monkeypatch.setattr(beforehand, "host_memory", lambda: 1000)

    def run(rank, *settings, roles=(Role.ActorRollout, Role.Critic)):
        read, engines = [], []
        monkeypatch.setattr(beforehand, "read_ahead", lambda paths, most: read.append((paths, most)))
        monkeypatch.setattr(beforehand, "get_rollout_class", engines.append)
        monkeypatch.setenv("RANK", str(rank))
        pickle.loads(pickle.dumps(TaskRunner()._preparing(compose_config([*NEEDED, *settings]), roles)))()
        return (read or None), engines, [phase.what for phase in startup.phases()]

    return run


def test_the_first_rank_reads_the_models_and_loads_the_engine(prepare):
    # Half of the machine's 1000 bytes, at most.
    assert prepare(0, *GAD) == (
        [(["/student", "/critic"], 500)], ["hf"], ["loading libraries", "loading the hf engine's libraries"]
    )  # fmt: skip


def test_other_ranks_read_nothing_since_weights_are_sent_to_them(prepare):
    assert prepare(1, *GAD)[:2] == (None, ["hf"])


def test_what_a_run_does_without_is_not_read_or_loaded(prepare):
    assert prepare(0, *SEQKD)[:2] == ([(["/student"], 500)], [])
    shared = ("actor_rollout_ref.model.use_shm=True", "critic.model.use_shm=True")
    assert prepare(0, *GAD, *shared)[:2] == ([([], 500)], ["hf"])


def test_engines_on_devices_of_their_own_are_loaded_there_alone(prepare):
    assert prepare(1, *GAD, *AHEAD)[1] == []
    assert prepare(1, *GAD, *AHEAD, roles=(Role.Rollout,))[1] == ["hf"]
