"""run.json: what a run leaves of itself in its folder."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import verl
from verl.monitor.report.provenance import read_record
from verl.trainer.config.loading import compose_config, composed_preset
from verl.trainer.config.overrides import CONFIG_DIR
from verl.trainer.ppo import run_record
from verl.trainer.ppo.run_record import describe_start, keep_record, keep_start_seconds

NEEDED = [
    "data.train_files=train.parquet", "actor_rollout_ref.model.path=student", "critic.model.path=critic",
    "trainer.experiment_name=x", "trainer.device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("stage", ["seqkd", "warmup", "gad", "gad_short", "soda"])
def test_the_preset_and_what_differs_from_it(stage):
    critic = [] if stage in ("seqkd", "soda") else ["critic.optim.lr=7e-7"]
    config = compose_config([f"stage={stage}", *NEEDED[:2], *NEEDED[3:], *critic, "critic.model.path=critic"])
    found = describe_start(config)
    assert (found["preset"], found["stage"]) == (stage, config.stage)
    changed = found["changed"]
    assert changed.pop("data.train_files")[1] == "train.parquet"
    assert changed.pop("actor_rollout_ref.model.path")[1] == "student"
    assert changed.pop("critic.model.path")[1] == "critic"
    changed.pop("trainer.device", None)  # where there is a GPU
    learning_rate = changed.pop("critic.optim.lr", None)
    assert (learning_rate is None) == (not critic) and (learning_rate is None or learning_rate[1] == 7e-7)
    assert [key for key in changed if not key.startswith("trainer")] == []


def test_what_follows_from_another_setting_is_no_change_of_its_own():
    own = ["data.max_response_length=77", "data.train_batch_size=6", "critic.ppo_mini_batch_size=3"]
    changed = describe_start(compose_config(["stage=gad", *NEEDED, *own]))["changed"]
    assert changed["data.max_response_length"] == [1536, 77] and changed["data.train_batch_size"] == [256, 6]
    # The actor's mini-batch and the engine's limit are the data's; the critic's was given.
    assert "actor_rollout_ref.rollout.response_length" not in changed
    assert "actor_rollout_ref.actor.ppo_mini_batch_size" not in changed
    assert changed["critic.ppo_mini_batch_size"][1] == 3


def test_within_a_command_of_hydras():
    """Where one Hydra is at work already, as under `hydra.main`; it is not disturbed."""
    config = compose_config(["stage=gad", *NEEDED])
    composed_preset.cache_clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert describe_start(config)["changed"]["data.train_files"][1] == "train.parquet"
        assert compose_config(["stage=gad", *NEEDED]) == config
        assert GlobalHydra.instance().hydra is outer is not None
    assert not GlobalHydra.instance().is_initialized()


def test_versions_device_and_revision():
    found = describe_start(compose_config(["stage=gad", *NEEDED]))
    assert found["versions"]["verl"] == verl.__version__ and "torch" in found["versions"]
    assert re.match(r"1 x cpu \(.+\)", found["device"]) and found["started"].endswith(" UTC")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["git"] == (git.stdout.strip() if git.returncode == 0 else None)


def test_every_resumed_start_adds_an_entry(tmp_path):
    config = compose_config(["stage=gad", *NEEDED])
    folder = tmp_path / "new"
    for resumed, starts in ((False, 1), (True, 2), (True, 3), (False, 1)):
        keep_record(config, folder, resumed)
        assert read_record(folder)["starts"] == starts
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    (folder / "run.json").write_text("cut off")
    keep_record(config, folder, resumed=True)
    assert read_record(folder)["starts"] == 1


def test_a_record_that_fails_ends_nothing(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    config = compose_config(["stage=gad", *NEEDED])
    keep_record(config, tmp_path / "file", resumed=False)
    assert "run.json is not kept" in caplog.text
    monkeypatch.setattr(run_record, "describe_start", lambda config: 1 / 0)
    keep_record(config, tmp_path, resumed=False)
    assert caplog.text.count("run.json is not kept") == 2


def test_seconds_are_the_last_starts_and_never_another_ones(tmp_path, monkeypatch):
    config = compose_config(["stage=gad", *NEEDED])

    def seconds():
        starts = json.loads((tmp_path / "run.json").read_text())["starts"]
        return [start.get("seconds_to_first_step") for start in starts]

    for resumed, total in ((False, 5), (True, 7)):
        keep_record(config, tmp_path, resumed)
        keep_start_seconds(tmp_path, {"total": total})
    assert seconds() == [{"total": 5}, {"total": 7}]
    monkeypatch.setattr(run_record, "describe_start", lambda config: 1 / 0)
    keep_record(config, tmp_path, resumed=True)
    keep_start_seconds(tmp_path, {"total": 9})
    assert seconds() == [{"total": 5}, {"total": 7}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": []}', '{"starts": [7]}', "\ud800"])
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_record(tmp_path) is None


def test_what_has_another_shape_in_a_record_is_left_out(tmp_path):
    start = {"git": 7, "versions": [1], "changed": {"a": [1, 2], "b": 3}, "device": "cpu"}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{}, start]}))
    found = {"device": "cpu", "dirty": False, "versions": {}, "changed": {"a": [1, 2]}, "starts": 2}
    assert read_record(tmp_path) == found


def test_it_is_json_as_a_whole(tmp_path):
    keep_record(compose_config(["stage=soda", *NEEDED]), tmp_path, resumed=False)
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert set(start) == {"started", "stage", "preset", "changed", "device", "git", "dirty", "versions"}
