"""Folders of verl's classic trainer (`model_world_size_W_rank_R.pt`), written by torch's own FSDP, into Hugging Face
folders; and nothing that a pickle wants to run is run."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny import SIZES, byte_tokenizer, write_data
from tests.tools import classic_ranks
from tests.tools.classic_ranks import CASES
from verl.model_merger import compare, merge
from verl.model_merger.classic import merge_classic
from verl.model_merger.cli import main as merger
from verl.models.finding import check_files
from verl.tools.score.__main__ import main as score
from verl.utils.checkpoint.checkpoint_manager import damage_of
from verl.utils.checkpoint.classic import RankFiles, rank_files

OF_TORCH_2_6 = Path(__file__).parent / "classic_of_torch_2_6"


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classic")
    subprocess.run([sys.executable, "-m", classic_ranks.__name__, folder], check=True)
    for case, (_, name, world) in CASES.items():
        config = classic_ranks.model(name).config
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder / case / "huggingface")
        byte_tokenizer().save_pretrained(folder / case / "huggingface")
        (folder / case / "fsdp_config.json").write_text(f'{{"FSDP_version": 1, "world_size": {world}}}')
    return folder


@pytest.fixture
def actor(written, tmp_path):
    """Three ranks' files, to be damaged."""
    return shutil.copytree(written / "fsdp2-3", tmp_path / "old" / "global_step_3" / "actor")


def flags(local_dir, target):
    return ["--backend", "fsdp", "--local_dir", str(local_dir), "--target_dir", str(target)]


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as end:
        merger(list(arguments))
    return str(end.value)


def opened(folder, kind) -> PreTrainedModel:
    auto = AutoModelForTokenClassification if kind == "score" else AutoModelForCausalLM
    return auto.from_pretrained(folder)


# ---- what comes out


@pytest.mark.parametrize("case", [case for case in CASES if case != "large-2"])
def test_the_tensors_are_those_that_the_ranks_held(written, tmp_path, case):
    _, name, _ = CASES[case]
    expected = classic_ranks.model(name).state_dict()
    value = ["--is-value-model"] if name == "score" else []
    merger(["merge", *flags(written / case, tmp_path / "half"), *value])
    merger(["merge", *flags(written / case, tmp_path / "full"), *value, "--dtype", "float32"])
    for folder, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        model = opened(tmp_path / folder, name)
        found = model.state_dict()
        assert found.keys() == expected.keys() and model.dtype == dtype
        assert all(torch.equal(found[key], expected[key].to(dtype)) for key in expected)
        check_files(tmp_path / folder)
        assert compare(written / case, tmp_path / folder, name == "score") == len(expected) - (name == "policy")


def test_it_is_written_in_files_with_an_index_and_replaces_another(written, tmp_path):
    folder, case = tmp_path / "out", written / "fsdp1-3"
    merge(case, folder)
    assert (folder / "model.safetensors").is_file()
    merge_classic(case, folder, case / "huggingface", file_size=20_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3 and not (folder / "model.safetensors").exists()
    check_files(folder)
    expected, found = classic_ranks.model("untied").state_dict(), opened(folder, "policy").state_dict()
    assert all(torch.equal(found[key], expected[key].bfloat16()) for key in expected)
    found["lm_head.weight"][0, 0] += 1
    model = classic_ranks.model("untied").to(torch.bfloat16)
    model.load_state_dict(found)
    model.save_pretrained(folder / "other")
    with pytest.raises(ValueError, match=r"differs from .* in 1 tensors, e\.g\. \['lm_head\.weight'\]"):
        compare(case, folder / "other")


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2-hsdp", "fsdp1"])
def test_files_of_an_older_torch_are_read(kind):
    """Written by torch 2.6: `weight` (5, 3) counts from 0 by rows, `bias` (1,) is 7."""
    folder = OF_TORCH_2_6 / kind
    ranks = RankFiles(rank_files(folder))
    assert sorted(ranks.names()) == ["bias", "weight"]
    assert torch.equal(ranks.whole("weight", torch.Size([5, 3]), torch.float32), torch.arange(15.0).view(5, 3))
    assert torch.equal(ranks.whole("bias", torch.Size([1]), torch.float32), torch.tensor([7.0]))


@pytest.mark.parametrize("names", ["memory", "published"])
def test_experts_come_out_one_by_one(tmp_path, names):
    """Under the names of today's transformers in memory, and under those that older ones had there too."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, pad_token_id=0, eos_token_id=1))
    model.save_pretrained(tmp_path / "published")
    byte_tokenizer().save_pretrained(tmp_path / "old" / "huggingface")
    model.config.save_pretrained(tmp_path / "old" / "huggingface")
    state = model.state_dict()
    if names == "published":
        state = load_file(tmp_path / "published" / "model.safetensors")
    assert any("experts.3.up_proj" in name for name in state) == (names == "published")
    torch.save(state, tmp_path / "old" / "model_world_size_1_rank_0.pt")
    merge_classic(
        tmp_path / "old", tmp_path / "out", tmp_path / "old" / "huggingface", dtype=torch.float32, file_size=30_000
    )
    found, expected = opened(tmp_path / "out", "policy").state_dict(), model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert compare(tmp_path / "old", tmp_path / "published") == compare(tmp_path / "old", tmp_path / "out")


def test_memory_holds_a_file_and_not_the_model(written, tmp_path):
    """202 MB of weights in files of 20 MB: what a file is made of, the file and a copy of it are 60 MB."""
    command = [sys.executable, "-m", "tests.tools.merging_with_little_memory"]
    child = subprocess.run(
        [*command, written / "fsdp2-3", written / "large-2", tmp_path], capture_output=True, text=True, check=True
    )
    grown = int(child.stdout)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert size > 200e6
    assert grown < 90e6, f"{grown / 1e6:.0f} MB"


# ---- what is refused


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("place", ["value", "beside", "getattr", "plain"])
def test_nothing_that_a_pickle_wants_to_run_is_run(actor, tmp_path, place):
    file, marker = actor / "model_world_size_3_rank_1.pt", tmp_path / "ran"
    evil = Evil(os.system, f"touch {marker}")
    if place == "plain":
        file.write_bytes(pickle.dumps({"a": evil}))
    elif place == "getattr":
        torch.save({"a": Evil(getattr, "x", "upper")}, file)
    else:
        state = torch.load(actor / "model_world_size_3_rank_1.pt", weights_only=False)
        torch.save({**state, "lm_head.weight": evil} if place == "value" else {**state, "more": [evil]}, file)
    said = refused("merge", *flags(actor, tmp_path / "out"))
    assert str(file) in said
    assert ("damaged" if place == "plain" else "nothing of it was run") in said
    assert place in ("plain", "getattr") or "system" in said
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_damaged_folder_is_named_with_what_to_do(actor, tmp_path):
    first, second = (actor / f"model_world_size_3_rank_{rank}.pt" for rank in (0, 1))
    content = second.read_bytes()
    merge_flags = ("merge", *flags(actor, tmp_path / "out"))

    second.unlink()
    said = refused(*merge_flags)
    assert "expected the files of ranks 0 to 2, got 2 files (missing: model_world_size_3_rank_1.pt)" in said
    flipped = bytearray(content)
    flipped[content.index(b"/data/") + 1000] ^= 1
    for broken in (content[: len(content) // 2], b"", bytes(flipped)):
        second.write_bytes(broken)
        said = refused(*merge_flags)
        assert f"{second} is damaged or cut short: expected" in said and f"got {len(broken)} bytes" in said
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    assert "is a Git LFS pointer" in refused(*merge_flags)
    shutil.copy(first, second)
    assert "two of the files" in refused(*merge_flags)
    second.write_bytes(content)
    (actor / "model_world_size_2_rank_0.pt").write_bytes(content)
    assert "got some of 2 and of 3 ranks, and fsdp_config.json says 3" in refused(*merge_flags)
    (actor / "model_world_size_2_rank_0.pt").rename(actor / "model_world_size_3_rank_3.pt")
    assert "foreign: model_world_size_3_rank_3.pt" in refused(*merge_flags)
    (actor / "model_world_size_3_rank_3.pt").unlink()
    (actor / "fsdp_config.json").write_text('{"world_size": 4}')
    assert "got some of 3 ranks, and fsdp_config.json says 4" in refused(*merge_flags)
    (actor / "fsdp_config.json").unlink()
    assert not (tmp_path / "out").exists()
    merger(list(merge_flags))


def test_one_rank_twice_is_no_other_rank(written, tmp_path):
    """Of FSDP1, in which the parts are of one size."""
    old = shutil.copytree(written / "fsdp1-2", tmp_path / "old")
    shutil.copy(old / "model_world_size_2_rank_0.pt", old / "model_world_size_2_rank_1.pt")
    said = refused("merge", *flags(old, tmp_path / "out"))
    assert "expected a tensor of (260, 32)" in said and "got parts that begin at [0, 0]" in said


def test_files_of_another_world_under_these_names(written, tmp_path):
    """Two of four ranks' files of FSDP1, renamed."""
    old = shutil.copytree(written / "fsdp1-critic-4", tmp_path / "critic")
    (old / "fsdp_config.json").unlink()
    for rank in range(4):
        file = old / f"model_world_size_4_rank_{rank}.pt"
        file.rename(old / f"model_world_size_2_rank_{rank}.pt") if rank < 2 else file.unlink()
    said = refused("merge", *flags(old, tmp_path / "out"))
    assert "expected a tensor of (260, 32) from the 2 files" in said and "got parts of (65, 32), (65, 32)" in said


def test_another_model_than_the_config_says(written, actor, tmp_path):
    config = actor / "huggingface" / "config.json"
    text = config.read_text()
    out = flags(actor, tmp_path / "out")
    config.write_text(text.replace('"hidden_size": 32', '"hidden_size": 64'))
    assert "expected a tensor of (260, 64)" in refused("merge", *out)
    Qwen2Config(**{**SIZES, "num_hidden_layers": 1}).save_pretrained(config.parent)
    assert "missing: [], foreign: ['model.layers.1" in refused("merge", *out)
    shutil.rmtree(actor / "huggingface")
    said = refused("merge", *out)
    assert f"expected config.json and the tokenizer in {actor}/huggingface" in said and "--hf_model_path" in said
    merger(["merge", *out, "--hf_model_path", str(written / "fsdp1-2" / "huggingface")])
    # Merged into that model itself, nothing of it goes.
    base = tmp_path / "base"
    shutil.copytree(tmp_path / "out", base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert "whose weights would go" in refused("merge", *flags(actor, base), "--hf_model_path", str(base))
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    said = refused("merge", *flags(written / "fsdp2-1", tmp_path / "value"), "--is-value-model")
    assert "holds a language model" in said and not (tmp_path / "value").exists()


def test_a_head_that_is_not_the_embedding_is_not_lost(written, tmp_path):
    old = shutil.copytree(written / "fsdp1-1", tmp_path / "old")
    config = old / "huggingface" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "lm_head.weight" in refused("merge", *flags(old, tmp_path / "out"))


# ---- who else meets such a folder


def test_everyone_else_says_that_it_has_to_be_merged_first(actor, tmp_path):
    says = (
        rf"{actor} was written by verl's classic trainer and has to be merged first: run `python -m verl.model_merger"
    )
    with pytest.raises(FileNotFoundError, match=says):
        check_files(actor)
    data = str(write_data(tmp_path / "data.jsonl", 6))
    with pytest.raises(SystemExit) as end:
        score(["--data", data, "--critic", str(actor), "--device", "cpu"])
    assert "has to be merged first" in str(end.value.code)
    assert "classic trainer" in damage_of(actor.parent)
