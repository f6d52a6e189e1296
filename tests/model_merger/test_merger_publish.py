"""A model onto a hub: the command in a process of its own, a hub on this machine that serves what was sent; and the
model card, written from the files of real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.e2e.running import train
from tests.hub_server import Hub, serving
from tests.tiny import write_data, write_model
from verl.model_merger.card import MARK, card_of, shown_settings, trace, write_card
from verl.model_merger.cli import main
from verl.trainer.in_process import run_in_process

ROOT = Path(__file__).parents[2]
QUIET = ("trainer.test_freq=-1", "trainer.val_before_train=False", "trainer.total_training_steps=2")
SECRET = "what nobody else is to read"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SeqKD, and a warmup from its actor; texts and places that no card may have."""
    path = tmp_path_factory.mktemp("publish") / "home-of-somebody"
    path.mkdir()
    write_model(path / "tiny-base")
    (path / "base").symlink_to("tiny-base")
    write_data(path / "train.jsonl", rows=18)
    lines = (path / "train.jsonl").read_text()
    (path / "train.jsonl").write_text(lines.replace("a1?", SECRET[:20]))
    shutil.copy(path / "train.jsonl", path / "val.jsonl")
    model = f"actor_rollout_ref.model.path={path}/tiny-base"
    seqkd = train(path, "one", "stage=seqkd", *QUIET, model, f"data.cache_dir={path}/cache", run_with=run_in_process)
    (path / "mine.py").write_text(
        "import torch\n\n\ndef mine(scores):\n    return -(scores.teacher - scores.student).mean(), {}\n"
    )
    train(
        path, "two", "stage=warmup", *QUIET, f"actor_rollout_ref.model.path={seqkd}/global_step_2/actor",
        f"critic.model.path={seqkd}/global_step_2/actor", f"critic.discriminator.loss={path}/mine.py:mine",
        "critic.discriminator.pooling=last_token", "critic.held_out_prompts=0", run_with=run_in_process,
    )  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()
    return path


def actor(folder, run="two", part="actor") -> Path:
    return folder / "runs" / run / "global_step_2" / part


def command(folder, *flags, endpoint="", token="hf_test"):
    """The merger as a user starts it."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    own |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    argv = [sys.executable, "-m", "verl.model_merger", *map(str, flags)]
    return subprocess.run(argv, cwd=folder, env=own | {"HF_TOKEN": token}, capture_output=True, text=True, umask=0o027)


def merge_flags(folder, target, *more):
    return ["merge", "--backend", "fsdp", "--local_dir", actor(folder), "--target_dir", target, *more]


def test_what_was_sent_can_be_fetched_and_is_the_folder(folder, tmp_path):
    hub = Hub()
    with serving(hub) as endpoint:
        flags = merge_flags(folder, tmp_path / "student", "--hf_upload_path", "me/student")
        done = command(folder, *flags, "--private", endpoint=endpoint)
        assert done.returncode == 0, done.stderr
        again = command(folder, *flags, endpoint=endpoint)
        assert again.returncode == 0, again.stderr
    assert list(hub.created) == ["me/student"]
    made = hub.created["me/student"]
    assert made.get("private") is True or made.get("visibility") == "private"
    commit, files = hub.find("models", "me/student", "main")
    there = {str(path.relative_to(tmp_path / "student")): path.read_bytes()
             for path in (tmp_path / "student").rglob("*") if path.is_file()}  # fmt: skip
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == there
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= there.keys()
    assert "27,040 parameters in bfloat16, 0.05 MiB in 1 file" in done.stdout
    assert f"uploaded to {endpoint}/me/student/commit/{commit}" in again.stdout
    # Nobody but the owner's group may read here; 0600 it would be without a look at the umask.
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "student").iterdir()} == {"0o640"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.dtype == torch.bfloat16 and 'from_pretrained("me/student")' in there["README.md"].decode()


@pytest.mark.parametrize(
    ("refuses", "merged"), [({"repos/create": 401}, False), ({"large/": 403}, True), ({"/commit/": 403}, True)]
)
def test_a_hub_that_refuses_is_one_sentence_and_the_folder_stays(folder, tmp_path, refuses, merged):
    hub = Hub()
    hub.refuses = refuses
    target = tmp_path / "student"
    with serving(hub) as endpoint:
        done = command(folder, *merge_flags(folder, target, "--hf_upload_path", "me/student"), endpoint=endpoint)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith(f"error: --hf_upload_path: expected to write to me/student on {endpoint}, got ")
    assert "hf auth login" in sentence and "hf_test" not in done.stdout + done.stderr
    assert (target / "model.safetensors").is_file() == merged
    if merged:
        assert sentence.endswith(f"is whole in {target}; to send it later: hf upload me/student {target}")
        main(["test", "--backend", "fsdp", "--local_dir", str(actor(folder)), "--test_hf_dir", str(target)])
    else:
        assert "me/student" not in hub.created, "found before the work"


def test_a_hub_that_is_not_there_and_a_name_that_is_none(folder, tmp_path):
    flags = merge_flags(folder, tmp_path / "student", "--hf_upload_path")
    nobody = command(folder, *flags, "me/student", endpoint="http://127.0.0.1:1")
    assert "expected to write to me/student on http://127.0.0.1:1, got " in nobody.stderr
    with serving(Hub()) as endpoint:
        wrong = command(folder, *flags, "a/b/c", endpoint=endpoint)
    assert wrong.returncode == nobody.returncode == 2 and "expected to write to a/b/c" in wrong.stderr
    assert "Traceback" not in nobody.stderr + wrong.stderr and not (tmp_path / "student").exists()


# ---- the card

JUDGED = {
    "settings": {"data": ["/home/of/somebody/val.jsonl"], "endpoint": "http://host.of.somebody:8000/v1"},
    "teacher": {"numbers": {"rouge_l": 1.0, "mean_tokens": 9.04, "cut": 0.0}},
    "students": {
        "be|fore": {"numbers": {"rouge_l": 0.1234, "mean_tokens": 7.0, "cut": 0.25}},
        "two": {
            "numbers": {"rouge_l": 0.5, "mean_tokens": 8.96, "cut": None},
            "two_sample": {"accuracy": {"value": 0.6, "low": 0.55, "high": 0.65, "count": 9}},
            "pairwise": {"win_rate": {"value": None, "low": None, "high": None, "count": 0}},
        },
    },
}


def test_the_card_tells_the_way_from_the_base_and_nothing_private(folder, tmp_path, capsys):
    (folder / "runs" / "two" / "judge").mkdir(exist_ok=True)
    (folder / "runs" / "two" / "judge" / "judge.json").write_text(json.dumps(JUDGED))
    main([*map(str, merge_flags(folder, tmp_path / "card", "--card_only"))])
    assert capsys.readouterr().out == f"wrote {tmp_path}/card/README.md\n"
    assert [path.name for path in (tmp_path / "card").iterdir()] == ["README.md"]
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- distillation\n")
    assert "A student, distilled from the text of a teacher's answers: tiny-base -> SeqKD -> warmup." in card
    rows = [line.split(" | ")[:4] for line in card.splitlines() if line.startswith(("| SeqKD", "| warmup"))]
    assert rows == [["| SeqKD", "2", "18", "train.jsonl"], ["| warmup", "2", "18", "train.jsonl"]]
    assert "- `critic.discriminator.pooling=last_token`" in card and "- `critic.discriminator.loss=mine`" in card
    assert f"torch {torch.__version__}" in card
    judged = card[card.index("## Measured by the judge") :].splitlines()
    assert judged[4:7] == [
        "| be\\|fore | 0.123 | 7.0 | 25.0% | - | - |", "| two | 0.500 | 9.0 | - | 0.600 [0.550, 0.650] | - |",
        "| teacher | 1.000 | 9.0 | 0.0% | - | - |",
    ]  # fmt: skip
    for private in (
        str(folder),
        "home-of-somebody",
        "of/somebody",
        "host.of",
        SECRET[:20],
        os.uname().nodename,
        "cache",
    ):
        assert private not in card, private

    # One's own text stays; without the judge's file or with another one it is said.
    (tmp_path / "card" / "README.md").write_text(card.replace(MARK, "mine"))
    assert not write_card(tmp_path / "card", actor(folder))
    (tmp_path / "other.json").write_text("[]")
    for file in ("other.json", "none.json"):
        with pytest.raises(SystemExit, match=r"expected a report of python -m verl\.tools\.judge"):
            main([*map(str, merge_flags(folder, tmp_path / "x", "--card_only", "--judge", tmp_path / file))])
    # The run's own is looked at before anything is asked or merged.
    (folder / "runs" / "two" / "judge" / "judge.json").write_text("{")
    with pytest.raises(SystemExit, match=r"two/judge/judge\.json: expected a report of"):
        main([*map(str, merge_flags(folder, tmp_path / "x", "--hf_upload_path", "me/x"))])
    assert not (tmp_path / "x").exists()
    (folder / "runs" / "two" / "judge" / "judge.json").unlink()


def test_a_critics_card_and_that_of_a_model_whose_run_is_gone(folder, tmp_path):
    critic = card_of(actor(folder, part="critic"), "me/critic", score=True)
    assert "A discriminator, which scores" in critic and "AutoModelForTokenClassification" in critic
    alone = shutil.copytree(actor(folder), tmp_path / "actor")
    assert trace(alone) == ([], None)
    card = card_of(alone, "x", score=False)
    assert "distilled from the text of a teacher's answers.\n" in card and "## Training" not in card


def test_a_folder_of_verls_classic_trainer_gets_a_card_too(tmp_path):
    """Of its run nothing is known; the model is what was merged."""
    local = ROOT / "tests" / "tools" / "classic_of_torch_2_6" / "fsdp1"
    write_model(tmp_path / "merged")
    assert write_card(tmp_path / "merged", local, "me/old")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# old" in card and "AutoModelForCausalLM" in card and "## Training" not in card


def test_settings_that_a_card_shows():
    changed = {
        "data.train_batch_size": [256, 4], "data.train_files": [None, "/x/y"], "data.cache_dir": ["a", "/x"],
        "actor_rollout_ref.model.path": [None, "/x"], "critic.discriminator.loss": ["ranking", "/x/f.py:mine"],
        "ray_kwargs.ray_init.address": [None, "10.0.0.1"], "trainer.default_hdfs_dir": [None, "x"],
        "trainer.critic_warmup": [0, "auto"], "algorithm.x": ["a", "two words"], "soda.beta": [0.1, 0.2],
        "actor_rollout_ref.actor.y": [True, None],
    }  # fmt: skip
    assert shown_settings(changed) == {
        "actor_rollout_ref.actor.y": "null", "critic.discriminator.loss": "mine", "data.train_batch_size": "4",
        "soda.beta": "0.2", "trainer.critic_warmup": "auto",
    }  # fmt: skip
