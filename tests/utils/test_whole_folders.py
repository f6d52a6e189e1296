"""A folder is whole before it is used as a model: shards are counted, contents compared, files named."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from tests.e2e.running import assert_equal_tensors
from tests.tiny import causal_lm, scorer, write_data, write_model
from tests.utils import checkpoint_on_three_ranks
from verl.model_merger import merge
from verl.model_merger.cli import main as merger
from verl.models.finding import check_files
from verl.models.loading import load_model
from verl.models.shm import copy_to_shm
from verl.tools.judge.__main__ import main as judge
from verl.tools.score.__main__ import main as score
from verl.trainer.config import compose_config
from verl.trainer.ppo.model_checks import check_models
from verl.utils.checkpoint import whole
from verl.utils.checkpoint.best_link import point_best
from verl.utils.checkpoint.checkpoint_manager import publish_checkpoint, seal_checkpoint, verify_checkpoint
from verl.utils.checkpoint.sharded import read_full_tensors


def shard(number: int) -> str:
    return f"shard-{number:05d}-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(checkpoint_on_three_ranks.run, args=(3, folder), nprocs=3)
    seal_checkpoint(folder / "global_step_3.tmp", ("actor", "critic"))
    return publish_checkpoint(folder / "global_step_3.tmp")


@pytest.fixture
def checkpoint(written, tmp_path):
    """A checkpoint of three ranks, to be damaged."""
    return shutil.copytree(written, tmp_path / "run" / "global_step_3")


def flip(file, place=-1):
    """Another byte, of a tensor unless said otherwise."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def forget_checksums(checkpoint):
    """As if it had been written before there were any."""
    for file in checkpoint.rglob("checksums.json"):
        file.unlink()


def older(checkpoint):
    """As an earlier version of this trainer wrote it: checksums of the whole checkpoint alone."""
    for part in ("actor", "critic"):
        (checkpoint / part / "checksums.json").unlink()


# ---- whole ones


def test_what_three_ranks_wrote_is_what_they_held(checkpoint):
    expected = causal_lm(seed=5).state_dict()
    loaded = load_model(checkpoint / "actor", "policy").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    expected = scorer(seed=6).state_dict()
    loaded = load_model(checkpoint / "critic", "score").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    verify_checkpoint(checkpoint)


def test_a_folder_may_be_copied_away_linked_and_stripped_of_its_optimizer(checkpoint, tmp_path, caplog):
    alone = shutil.copytree(checkpoint / "actor", tmp_path / "student")
    shutil.rmtree(alone / "optim")
    (alone / "extra_state.json").unlink()
    (alone / "README.md").write_text("ours")
    (tmp_path / "link").symlink_to(checkpoint / "actor")
    point_best(checkpoint.parent, 3)
    for folder in (alone, tmp_path / "link", checkpoint.parent / "best" / "actor", copy_to_shm(alone, tmp_path)):
        check_files(folder)
    older(checkpoint)
    for folder in (
        tmp_path / "link",
        checkpoint.parent / "best" / "actor",
        copy_to_shm(checkpoint / "actor", tmp_path),
    ):
        check_files(folder)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


def test_without_checksums_the_shards_are_counted_and_it_is_said(checkpoint, caplog):
    forget_checksums(checkpoint)
    check_files(checkpoint / "actor")
    assert "has no checksums.json" in caplog.text


def test_a_checkpoint_that_was_never_completed_is_refused(checkpoint, tmp_path):
    forget_checksums(checkpoint)
    interrupted = shutil.copytree(checkpoint, tmp_path / "global_step_4.tmp")
    (checkpoint / "trainer_state.json").touch()
    for folder in (checkpoint, interrupted):
        with pytest.raises(FileNotFoundError, match=r"checksums\.json is missing, so .* was never completed"):
            check_files(folder / "actor")


def test_contents_are_read_once_in_a_process(checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(whole, "checksums_of", lambda part, names: read.append(part) or whole.part_checksums(part))
    check_files(checkpoint / "actor", contents=False)
    assert read == []
    for _ in range(3):
        check_files(checkpoint / "actor")
        check_files(checkpoint / "critic")
    assert read == [checkpoint / "actor", checkpoint / "critic"]


# ---- damage


def remove_first(part):
    (part / "model" / shard(1)).unlink()
    return shard(1)


def remove_middle(part):
    (part / "model" / shard(2)).unlink()
    return shard(2)


def remove_last(part):
    (part / "model" / shard(3)).unlink()
    return shard(3)


def cut_short(part):
    file = part / "model" / shard(2)
    file.write_bytes(file.read_bytes()[:-40])
    return shard(2)


def empty(part):
    (part / "model" / shard(2)).write_bytes(b"")
    return shard(2)


def replace_by_pointer(part):
    (part / "model" / shard(2)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    return shard(2)


def flip_a_weight(part):
    flip(part / "model" / shard(2))
    return shard(2)


def take_anothers_shard(part):
    """Of the same shapes, with other values."""
    file = part / "model" / shard(2)
    content = bytearray(file.read_bytes())
    content[-4000:] = bytes(value ^ 3 for value in content[-4000:])
    file.write_bytes(content)
    return shard(2)


def add_a_shard(part):
    """Left over from a checkpoint of more ranks."""
    shutil.copy(part / "model" / shard(3), part / "model" / shard(4))
    return shard(4)


def change_the_config(part):
    file = part / "huggingface" / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    return "huggingface/config.json"


def remove_the_tokenizer(part):
    (part / "huggingface" / "tokenizer.json").unlink()
    return "huggingface/tokenizer.json"


# With no checksums at all, only these can be seen.
STRUCTURE = (remove_first, remove_middle, remove_last, cut_short, empty, replace_by_pointer, add_a_shard)
DAMAGES = (*STRUCTURE, flip_a_weight, take_anothers_shard, change_the_config, remove_the_tokenizer)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["actor", "critic"])
@pytest.mark.parametrize("how", [lambda checkpoint: None, older], ids=["now", "older"])
def test_a_damaged_folder_is_refused_by_the_files_name(checkpoint, damage, part, how):
    how(checkpoint)
    kind = "policy" if part == "actor" else "score"
    # That it was whole a moment ago does not count.
    load_model(checkpoint / part, kind)
    name = damage(checkpoint / part)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_model(checkpoint / part, kind)
    assert name in str(refused.value) and str(checkpoint / part) in str(refused.value)
    other = "critic" if part == "actor" else "actor"
    check_files(checkpoint / other)


@pytest.mark.parametrize("damage", STRUCTURE)
def test_without_checksums_too(checkpoint, damage):
    forget_checksums(checkpoint)
    name = damage(checkpoint / "actor")
    with pytest.raises(ValueError) as refused:
        load_model(checkpoint / "actor", "policy")
    assert name in str(refused.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_refuses_the_same(checkpoint, damage):
    name = damage(checkpoint / "actor")
    with pytest.raises(ValueError, match=name):
        verify_checkpoint(checkpoint)


def test_damaged_checksums_and_missing_ones_are_named(checkpoint):
    flip(checkpoint / "actor" / "checksums.json", 0)
    with pytest.raises(ValueError, match=r"actor/checksums\.json is damaged"):
        check_files(checkpoint / "actor")
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checksums\.json is missing.*resume_path"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("number", [1, 2])
def test_tensors_alone_are_not_filled_with_what_memory_holds(checkpoint, number):
    (checkpoint / "actor" / "model" / shard(number)).unlink()
    with pytest.raises(ValueError, match=f"missing: {shard(number)}"):
        read_full_tensors(checkpoint / "actor" / "model")


# ---- everyone who reads a checkpoint as a model


# Within the tiny model's context.
LENGTHS = ("data.max_prompt_length=28", "data.max_response_length=10")


def run_config(checkpoint, base, *overrides):
    return compose_config(
        [
            "data.train_files=x",
            f"actor_rollout_ref.model.path={base}",
            "trainer.experiment_name=x",
            *LENGTHS,
            *overrides,
        ]
    )


def test_a_stray_file_beside_a_checkpoints_config_is_not_read(checkpoint):
    for part, kind in (("actor", "policy"), ("critic", "score")):
        expected = load_model(checkpoint / part, kind).state_dict()
        (checkpoint / part / "huggingface" / "model.safetensors").write_bytes(b"no tensors at all")
        assert_equal_tensors(load_model(checkpoint / part, kind).state_dict(), expected)


def test_a_run_looks_before_it_starts(checkpoint, tmp_path):
    base = write_model(tmp_path / "base")
    gad = ("stage=gad", f"critic.model.path={checkpoint}/critic")
    check_models(run_config(checkpoint, f"{checkpoint}/actor", *gad))
    flip_a_weight(checkpoint / "critic")
    with pytest.raises(ValueError, match=shard(2)):
        check_models(run_config(checkpoint, base, *gad))
    remove_first(checkpoint / "actor")
    with pytest.raises(ValueError, match=shard(1)):
        check_models(run_config(checkpoint, f"{checkpoint}/actor", "stage=seqkd"))


def stopped(command, arguments):
    with pytest.raises(SystemExit) as end:
        command(arguments)
    return str(end.value)


def test_the_merger_the_scorer_and_the_judge_refuse_it(checkpoint, tmp_path, capsys):
    write_data(tmp_path / "data.jsonl", 6)
    damaged = [damage(checkpoint / part) for damage, part in ((flip_a_weight, "actor"), (remove_middle, "critic"))]
    assert damaged == [shard(2)] * 2
    base = write_model(tmp_path / "base")
    for part in ("actor", "critic"):
        flags = ["--backend", "fsdp", "--local_dir", str(checkpoint / part)]
        assert shard(2) in stopped(merger, ["merge", *flags, "--target_dir", str(tmp_path / "merged")])
        assert shard(2) in stopped(merger, ["test", *flags, "--test_hf_dir", str(base)])
    assert not (tmp_path / "merged").exists()
    data = ["--data", str(tmp_path / "data.jsonl")]
    assert shard(2) in stopped(score, [*data, "--critic", str(checkpoint / "critic"), "--device", "cpu"])
    data += ["--out", str(tmp_path / "out"), "--device", "cpu", "--folds", "2"]
    assert shard(2) in stopped(judge, [*data, "--student", f"x={checkpoint / 'actor'}"])
    judged = ["--student", f"x={base}", "--judge_model", str(checkpoint / "actor")]
    assert shard(2) in stopped(judge, [*data, *judged])
    assert not (tmp_path / "out").exists(), "nothing is generated before the judge is looked at"


# ---- which model it is


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"\xd0", b'{"world_size": 3, "dtype": 3}', b'{"world_size": 3, "dtype": "x"}'],
)
def test_the_merger_names_a_damaged_fsdp_config(checkpoint, tmp_path, content, known):
    (checkpoint / "actor" / "fsdp_config.json").write_bytes(content)
    if not known:
        forget_checksums(checkpoint)
    with pytest.raises(ValueError, match=r"fsdp_config\.json.*(expected|changed since)"):
        merge(checkpoint / "actor", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"3", b'"x"', b'{"architectures": 3}', b'{"architectures": [3]}']
)
def test_the_merger_names_a_damaged_config(checkpoint, tmp_path, content):
    (checkpoint / "actor" / "huggingface" / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json.*(is damaged|changed since)"):
        merge(checkpoint / "actor", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_critic_is_no_student(checkpoint, caplog):
    with pytest.raises(ValueError, match=r"critic holds a discriminator.*actor folder"):
        check_models(run_config(checkpoint, f"{checkpoint}/critic", "stage=seqkd"))
    with pytest.raises(ValueError, match="holds a discriminator"):
        load_model(checkpoint / "critic", "policy")
    merger(["merge", "--backend", "fsdp", "--local_dir", f"{checkpoint}/critic", "--target_dir", f"{checkpoint}/m"])
    with pytest.raises(ValueError, match="holds a discriminator"):
        check_models(run_config(checkpoint, f"{checkpoint}/m", "stage=seqkd"))


def test_an_actor_becomes_a_critic_with_a_fresh_head_and_it_is_said(checkpoint, caplog):
    caplog.set_level("INFO")
    settings = ("stage=warmup", f"critic.model.path={checkpoint}/actor")
    check_models(run_config(checkpoint, f"{checkpoint}/actor", *settings))
    assert "actor is a language model: the discriminator starts from it with a fresh score head" in caplog.text
    with pytest.raises(ValueError, match="untrained discriminator"):
        check_models(run_config(checkpoint, f"{checkpoint}/actor", "stage=gad", settings[1]))


# ---- Hugging Face folders


@pytest.fixture
def sharded(tmp_path):
    """A Hugging Face folder in several files."""
    folder = write_model(tmp_path / "hf")
    causal_lm().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


@pytest.mark.parametrize("damage", ["missing", "pointer", "cut"])
def test_a_hugging_face_shard_is_named(sharded, damage):
    check_files(sharded)
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    if damage == "missing":
        file.unlink()
    elif damage == "pointer":
        file.write_text(POINTER)
    else:
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises((ValueError, FileNotFoundError), match=file.name):
        check_files(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_before_anything_is_read(tmp_path, name):
    folder = write_model(tmp_path / "hf")
    check_files(folder)
    (folder / "tf_model.h5").write_text(POINTER)  # never read
    check_files(folder)
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        check_models(run_config(None, folder, "stage=seqkd"))


@pytest.mark.parametrize(("text", "says"), [(POINTER, "is a Git LFS pointer"), ("{", "is damaged: expected JSON")])
def test_the_tools_name_a_config_that_is_none(tmp_path, text, says):
    folder, data = write_model(tmp_path / "hf"), str(write_data(tmp_path / "data.jsonl", 6))
    (folder / "config.json").write_text(text)
    assert f"config.json {says}" in stopped(score, ["--data", data, "--critic", str(folder), "--device", "cpu"])
    flags = ["--data", data, "--out", str(tmp_path / "out"), "--device", "cpu", "--folds", "2"]
    said = stopped(judge, [*flags, "--student", f"x={folder}"])
    assert "config.json" in said and (text == "{" or says in said)


def test_a_tokenizer_of_its_own_may_be_a_pointer_too(tmp_path):
    folder, other = write_model(tmp_path / "hf"), write_model(tmp_path / "chat")
    (other / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"chat/tokenizer\.json is a Git LFS pointer"):
        check_models(run_config(None, folder, "stage=seqkd", f"actor_rollout_ref.model.tokenizer_path={other}"))


def test_weights_in_pytorchs_own_format_and_none_at_all(tmp_path):
    folder = write_model(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        check_files(folder)
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a Git LFS pointer"):
        check_files(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    check_files(folder)
    (folder / "pytorch_model.bin.index.json").write_text("[]")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        check_files(folder)
    json.dump({"weight_map": {"a": "pytorch_model-1.bin"}}, (folder / "pytorch_model.bin.index.json").open("w"))
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-1\.bin is missing"):
        check_files(folder)
