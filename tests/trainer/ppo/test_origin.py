"""A run that resumes is the run that began: other models, stages and data are refused, or warned of if it is meant."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch

from tests.tiny import causal_lm, write_data, write_model
from verl.trainer import checked_run
from verl.trainer.config import compose_config
from verl.trainer.ppo.origin import Origin
from verl.utils.checkpoint.checkpoint_manager import commit_checkpoint, start_checkpoint
from verl.utils.checkpoint.sharded import write_sharded


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)
    write_data(tmp_path / "train.jsonl", 8)
    return tmp_path


def check_resume(config, rows):
    return checked_run.check_resume(config, rows, checked_run.resumed_from(config))


def config(folder, *overrides, stage="seqkd", model="a", data="train.jsonl"):
    return compose_config(
        [
            f"stage={stage}", f"data.train_files={folder}/{data}", f"actor_rollout_ref.model.path={folder}/{model}",
            "trainer.experiment_name=x", f"trainer.default_local_dir={folder}/run", *overrides,
        ]
    )  # fmt: skip


def save(folder, origin, parts=("actor",), files=()):
    temporary = start_checkpoint(folder / "run", 2)
    for part in parts:
        (temporary / part).mkdir()
        (temporary / part / "x").touch()
    for name in files:
        (temporary / name).touch()
    if origin is not None:
        origin.write(temporary)
    return commit_checkpoint(temporary)


def test_the_same_run_resumes(folder):
    first = check_resume(config(folder), 8)
    checkpoint = save(folder, first)
    assert Origin.read(checkpoint) == first
    assert (
        check_resume(config(folder, "trainer.total_training_steps=9", "actor_rollout_ref.actor.optim.lr=1e-3"), 8)
        == first
    )


def test_folders_and_files_may_be_moved(folder):
    save(folder, check_resume(config(folder), 8))
    (folder / "a").rename(folder / "moved")
    (folder / "train.jsonl").rename(folder / "same.jsonl")
    check_resume(config(folder, model="moved", data="same.jsonl"), 8)


CHANGES = {
    "another model": ({"model": "b"}, 8, r"actor_rollout_ref\.model\.path=.*/a, now .*/b"),
    "another stage": ({"stage": "soda"}, 8, "stage SeqKD, now SODA"),
    "other data": ({"data": "other.jsonl"}, 8, r"data\.train_files=.*train\.jsonl, now .*other\.jsonl"),
    "rows left out": ({}, 7, "8 rows of the training data, now 7"),
    "other turns": ({"turns": "all"}, 8, r"data\.turns=none, now all"),
    "another order": ({"seed": 5}, 8, "rows shuffled with seed .*, now shuffled with seed 5"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_in_the_same_folder_is_refused(folder, change, caplog):
    how, rows, says = CHANGES[change]
    write_data(folder / "other.jsonl", 9)
    checkpoint = save(folder, check_resume(config(folder), 8), files=("rejected.safetensors",))
    overrides = [f"data.{key}={value}" for key, value in how.items() if key in ("seed", "turns")]
    how = {key: value for key, value in how.items() if key not in ("seed", "turns")}
    with pytest.raises(
        ValueError, match=f"{says}.*experiment_name.*resume_mode=disable.*resume_from_path={checkpoint}"
    ):
        check_resume(config(folder, *overrides, **how), rows)
    check_resume(config(folder, *overrides, "trainer.resume_mode=disable", **how), rows)
    assert caplog.text == ""
    meant = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}")
    check_resume(config(folder, *overrides, *meant, **how), rows)
    assert "began otherwise" in caplog.text


@pytest.mark.parametrize(
    ("began", "now", "says"),
    [
        ((), ("data.train_batch_size=4",), r"data\.train_batch_size=\d+, now 4: the rows go on where they were"),
        (("data.shuffle=False",), ("data.shuffle=False", "data.seed=5"), r"data\.seed=\d+, now 5: answers are other"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_warned_of(folder, caplog, began, now, says):
    save(folder, check_resume(config(folder, *began), 8))
    check_resume(config(folder, *now), 8)
    assert re.search(rf"{says}.*\. What may change as you like: learning rates", caplog.text)


def test_what_may_change_is_not_warned_of(folder, caplog):
    save(folder, check_resume(config(folder), 8))
    free = ("actor_rollout_ref.actor.optim.lr=1e-3", "trainer.total_training_steps=9", "trainer.save_freq=1")
    check_resume(config(folder, *free, "actor_rollout_ref.actor.optim.weight_decay=0.1"), 8)
    assert caplog.text == ""


def test_an_origin_of_an_older_trainer_has_no_batch_size(folder, caplog):
    checkpoint = save(folder, None)
    fields = json.loads(json.dumps(asdict(Origin.of(config(folder), 8))))
    old = {name: value for name, value in fields.items() if name not in ("batch_size", "seed", "turns")}
    (checkpoint / "origin.json").write_text(json.dumps(old))
    check_resume(config(folder, "data.train_batch_size=4"), 8)
    assert caplog.text == ""


@pytest.mark.parametrize("change", ["model", "data"])
def test_the_same_path_with_another_content_is_another_one(folder, change):
    save(folder, check_resume(config(folder), 8))
    if change == "model":
        write_model(folder / "a", seed=1)
    else:
        file = folder / "train.jsonl"
        file.write_text(file.read_text().replace("It is 1", "It is 2"))
    with pytest.raises(ValueError, match="has another content now"):
        check_resume(config(folder), 8)


def test_a_look_at_a_checkpoint_is_only_warned(folder, caplog):
    save(folder, check_resume(config(folder), 8))
    check_resume(config(folder, "trainer.val_only=True", "data.val_files=x", model="b"), 8)
    assert "began otherwise" in caplog.text


def test_a_checkpoint_of_an_older_trainer_says_nothing(folder, caplog):
    save(folder, None)
    check_resume(config(folder, model="b"), 8)
    assert caplog.text == ""


def test_another_discriminator_and_one_that_is_missing(folder):
    warmup = ("trainer.critic_warmup=10",)
    save(
        folder,
        check_resume(config(folder, f"critic.model.path={folder}/a", *warmup, stage="warmup"), 8),
        ("actor", "critic"),
    )
    check_resume(config(folder, f"critic.model.path={folder}/a", *warmup, stage="warmup"), 8)
    with pytest.raises(ValueError, match=r"critic\.model\.path=.*/a, now .*/b"):
        check_resume(config(folder, f"critic.model.path={folder}/b", *warmup, stage="warmup"), 8)
    with pytest.raises(ValueError, match="stage warmup, now GAD"):
        check_resume(config(folder, f"critic.model.path={folder}/a", stage="gad"), 8)
    shutil.rmtree(folder / "run")
    save(folder, check_resume(config(folder), 8))
    with pytest.raises(FileNotFoundError, match="it has no critic; was it another stage's"):
        check_resume(config(folder, f"critic.model.path={folder}/a", *warmup, stage="warmup"), 8)


def write_actor(folder, seed, checksums):
    temporary = start_checkpoint(folder, 5)
    weights = {name: tensor for name, tensor in causal_lm(seed=seed).state_dict().items() if name != "lm_head.weight"}
    write_sharded(weights, temporary / "actor" / "model")
    (temporary / "actor" / "huggingface").mkdir()
    (temporary / "actor" / "huggingface" / "config.json").write_text("{}")
    final = commit_checkpoint(temporary)
    if not checksums:
        (final / "checksums.json").unlink()
    return f"{final.relative_to(folder.parent)}/actor"


@pytest.mark.parametrize("checksums", [True, False])
def test_a_checkpoints_folder_is_known_by_its_weights_too(folder, checksums):
    models = [write_actor(folder / f"run{seed}", seed, checksums) for seed in (3, 3, 4)]
    save(folder, check_resume(config(folder, model=models[0]), 8))
    check_resume(config(folder, model=models[1]), 8)
    with pytest.raises(ValueError, match=r"model\.path"):
        check_resume(config(folder, model=models[2]), 8)


def test_weights_in_many_files_are_all_looked_at(folder):
    model = causal_lm()
    model.save_pretrained(folder / "a", max_shard_size="40KB")
    (folder / "a" / "model.safetensors").unlink()
    first = check_resume(config(folder), 8)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    model.save_pretrained(folder / "a", max_shard_size="40KB")
    assert check_resume(config(folder), 8).actor.digest != first.actor.digest
    index = folder / "a" / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) >= 3
