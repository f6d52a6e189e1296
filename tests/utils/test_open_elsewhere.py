"""Merged folders open with transformers 4.57 as the base model did: the same function, tokenizer and end of answers.

Version 4 is installed beside the torch that is there, from the package index, into pytest's cache: three packages
without their dependencies, which version 5 has brought. Where there is no index the tests fail: that others can open
what is given away is one of the things to know before it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.tiny import SIZES, byte_tokenizer, scorer
from tests.utils.opened_by_version_4 import IDS, TEXT
from verl.model_merger import merge
from verl.models.loading import hf_files, load_config, load_model
from verl.models.tokenizer import load_tokenizer
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.checkpoint.hf_files import with_eos

VERSION_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2")


@pytest.fixture(scope="session")
def version_4(request):
    """The folder to put first on Python's path."""
    folder = Path(request.config.cache.mkdir("transformers-4.57.6"))
    if not (folder / "installed").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, *VERSION_4], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{' '.join(VERSION_4)} cannot be installed, which this test needs a package index for: "
                        f"{done.stderr[-500:]}")  # fmt: skip
        (folder / "installed").touch()
    return folder


def seen_by_version_4(version_4, *folders: Path) -> list[dict]:
    script = Path(__file__).with_name("opened_by_version_4.py")
    environment = {**os.environ, "PYTHONPATH": str(version_4), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, folders)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((folder / "seen.json").read_text()) for folder in folders]
    assert all(entry["version"] == "4.57.6" for entry in seen) and not transformers.__version__.startswith("4")
    return seen


# ---- base models


TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def write_tokenizer(folder: Path, **entries) -> None:
    """As version 4 writes it: its class, and the template inside the config."""
    byte_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "additional_special_tokens": ["<user>", "<bot>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        **entries,
    }
    # No order and indentation of ours.
    (folder / "tokenizer_config.json").write_text(json.dumps(config, separators=(", ", ":")), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": config["eos_token"]}, indent=0))


def write_base(folder: Path, config, version=5, eos=1, **entries) -> Path:
    """A random model; with `version=4` its config.json is written as that version does, `entries` in it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if version == 4:
        file = folder / "config.json"
        old = json.loads(file.read_text())
        del old["rope_parameters"], old["dtype"]
        file.write_text(json.dumps(old | entries | {"transformers_version": "4.51.0", "torch_dtype": "float32"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6, "top_p": 0.9}))
    write_tokenizer(folder)
    return folder


def train(base: Path, folder: Path, kind="policy", tokenizer: Path | None = None, **override) -> Path:
    """A checkpoint of weights that have moved, and from it the merged folder."""
    model = load_model(base, kind, override)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(
        model, optimizer, schedule, load_tokenizer(tokenizer or base), torch.float32, hf_files(base, tokenizer)
    )
    manager.save_checkpoint(folder / "checkpoint")
    return merge(folder / "checkpoint", folder / "merged")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 5e5,
            "original_max_position_embeddings": 64}  # fmt: skip
TIED = {**SIZES, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
UNTIED = TIED | {"tie_word_embeddings": False}
THETA = {"rope_type": "default", "rope_theta": 5e5}
MOE = {**UNTIED, "num_experts_per_tok": 2, "rope_parameters": THETA}
NEOX = {key: value for key, value in UNTIED.items() if key != "num_key_value_heads"}

BASES = {
    "llama of version 4": (LlamaConfig(**TIED), {"version": 4, "rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "qwen2 of version 4": (Qwen2Config(**TIED), {"version": 4, "rope_theta": 1e6}),
    "llama3": (LlamaConfig(**UNTIED, rope_parameters={**LLAMA3, "rope_theta": 5e5}), {}),
    "qwen2, yarn": (Qwen2Config(**TIED, rope_parameters=YARN), {}),
    "phi3, longrope": (Phi3Config(**UNTIED, rope_parameters=LONGROPE, original_max_position_embeddings=64), {}),
    "mixtral": (MixtralConfig(**MOE, num_local_experts=4, sliding_window=None), {}),
    "qwen3_moe": (Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=16, head_dim=8), {}),
    "gpt_neox": (GPTNeoXConfig(**NEOX, rope_parameters={**THETA, "partial_rotary_factor": 0.5}), {}),
    "gemma3, by layer": (
        Gemma3TextConfig(**TIED, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
                         rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
                                          "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(version_4, tmp_path_factory):
    """Of every base, and of a critic, its folder, the merged one, and what version 4 saw of it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    bases = {name: write_base(folder / str(n), config, **how) for n, (name, (config, how)) in enumerate(BASES.items())}
    bases["critic"] = write_base(folder / "base", Qwen2Config(**TIED, rope_parameters=THETA))
    kinds = dict.fromkeys(BASES, "policy") | {"critic": "score"}
    merged = {name: train(base, folder / f"of {base.name}", kinds[name]) for name, base in bases.items()}
    seen = seen_by_version_4(version_4, *merged.values())
    return {name: (bases[name], merged[name], saw) for name, saw in zip(bases, seen, strict=True)}


def logits(folder: Path, auto: type[PreTrainedModel] = AutoModelForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor(IDS)).logits


# ---- what version 4 sees


@pytest.mark.parametrize("name", BASES)
def test_it_is_the_same_function_there(opened, name):
    _, merged, seen = opened[name]
    assert (seen["missing"], seen["unexpected"], seen["dtype"]) == ([], [], "torch.float32")
    expected = logits(merged)
    assert expected.std() > 0.1, "otherwise any position would do"
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_its_tokenizer_opens_there(opened, name):
    _, merged, seen = opened[name]
    tokenizer = load_tokenizer(merged)
    assert seen["ids"] == tokenizer(TEXT)["input_ids"]
    assert seen["template"] == "<user>hi"
    assert seen["special"] == ["<eos>", None]
    assert seen["eos"] == seen["eos in config"] == 1


@pytest.mark.parametrize("name", BASES)
def test_version_5_reads_what_it_wrote(opened, name):
    base, merged, _ = opened[name]
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (base, merged))
    for config in (before, after):
        del config["_name_or_path"]
        # Old spellings are kept as they come.
        for key in ("rope_theta", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"):
            config.pop(key, None)
        config["rope_parameters"].pop("type", None)
    assert after == before


@pytest.mark.parametrize("name", BASES)
def test_the_tokenizers_files_are_the_bases_own(opened, name):
    base, merged, _ = opened[name]
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (merged / file).read_bytes() == (base / file).read_bytes()
    assert not (merged / "chat_template.jinja").exists()


def test_what_version_4_wrote_in_the_config_stays(opened):
    for name in ("llama of version 4", "qwen2 of version 4"):
        base, merged, _ = opened[name]
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, merged))
        assert {key: after[key] for key in before} == before
        assert after.keys() - before.keys() == {"dtype"}


def test_a_critic_opens_there(opened):
    _, merged, seen = opened["critic"]
    assert json.loads((merged / "config.json").read_text())["classifier_dropout"] == 0.0
    assert (seen["class"], seen["missing"]) == ("Qwen2ForTokenClassification", [])
    expected = logits(merged, AutoModelForTokenClassification)
    assert expected.shape[-1] == 1 and expected.std() > 0.1
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected, atol=1e-4, rtol=1e-4)


# ---- what training changed


def entries(folder: Path, file: str = "config.json") -> dict:
    return json.loads((folder / file).read_text())


def test_dropout_is_the_bases_again(tmp_path):
    """It is off in training, whatever the base says."""
    config = transformers.GPT2Config(
        vocab_size=260, n_embd=32, n_layer=1, n_head=4, resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3, eos_token_id=1
    )
    base = write_base(tmp_path / "base", config)
    assert load_config(base, "policy").resid_pdrop == 0.0
    merged = train(base, tmp_path)
    for folder in (tmp_path / "checkpoint" / "huggingface", merged):
        rates = {key: value for key, value in entries(folder).items() if "pdrop" in key}
        assert rates == {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3}


def test_an_override_is_written_under_all_its_names(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED), version=4, rope_theta=1e6)
    merged = train(base, tmp_path, rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 2e6})
    assert entries(merged)["rms_norm_eps"] == 1e-4
    assert entries(merged)["rope_theta"] == entries(merged)["rope_parameters"]["rope_theta"] == 2e6
    assert AutoConfig.from_pretrained(merged).rope_parameters["rope_theta"] == 2e6


def test_a_second_stage_hands_on_what_the_first_was_given(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED, attention_dropout=0.1), version=4, rope_theta=1e6)
    train(base, tmp_path / "one")
    merged = train(tmp_path / "one" / "checkpoint", tmp_path / "two")
    assert {key: entries(merged)[key] for key in entries(base)} == entries(base)
    assert (merged / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_the_type_is_that_of_the_weights(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED), version=4)
    train(base, tmp_path)
    file = tmp_path / "checkpoint" / "fsdp_config.json"
    file.write_text(file.read_text().replace("float32", "bfloat16"))
    merged = merge(tmp_path / "checkpoint", tmp_path / "merged16")
    assert entries(merged)["dtype"] == entries(merged)["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16


def test_the_models_folder_may_be_gone_when_a_checkpoint_is_written(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED))
    files = hf_files(base)
    moved = base.rename(tmp_path / "elsewhere")
    model = load_model(moved, "policy")
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    manager = FSDPCheckpointManager(model, optimizer, schedule, load_tokenizer(moved), torch.float32, files)
    manager.save_checkpoint(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "huggingface" / "tokenizer.json").is_file()


# ---- the end of an answer


@pytest.mark.parametrize(
    ("named", "eos", "merged"),
    [(1, 1, 1), (1, 3, [3, 1]), ([1, 2], 2, [1, 2]), ([1, 2], 3, [3, 1, 2]), (None, 3, 3)],
)
def test_generation_ends_with_the_tokenizers_eos(named, eos, merged):
    assert with_eos(named, eos) == merged


@pytest.mark.parametrize("kind", ["policy", "score"])
def test_the_eos_of_another_tokenizer_ends_the_merged_model(tmp_path, kind):
    """A base model that ends with 1, trained with a chat tokenizer that ends with <bot>, 3."""
    base = write_base(tmp_path / "base", Qwen2Config(**TIED), eos=[1, 2])
    chat = write_base(tmp_path / "chat", Qwen2Config(**TIED))
    write_tokenizer(chat, eos_token="<bot>")
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    merged = train(base, tmp_path, kind, tokenizer=chat)
    assert load_tokenizer(merged).eos_token_id == 3
    assert entries(merged)["eos_token_id"] == [3, 1]
    if kind == "policy":
        generation = entries(merged, "generation_config.json")
        assert generation == {"eos_token_id": [3, 1, 2], "temperature": 0.6, "top_p": 0.9}
        assert load_model(merged, "policy").generation_config.eos_token_id == [3, 1, 2]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / file).read_bytes() == (chat / file).read_bytes()


def test_merging_again_into_a_folder_leaves_no_other_tokenizer_there(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED))
    for name, text in {"chat_template.jinja": "stale", "vocab.json": "{}", "README.md": "mine"}.items():
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged" / name).write_text(text)
    merged = train(base, tmp_path)
    assert not (merged / "chat_template.jinja").exists() and not (merged / "vocab.json").exists()
    assert (merged / "README.md").read_text() == "mine"


def test_a_model_without_a_generation_config_gets_one(tmp_path):
    base = write_base(tmp_path / "base", Qwen2Config(**TIED))
    (base / "generation_config.json").unlink()
    write_tokenizer(base, eos_token="<bot>")
    merged = train(base, tmp_path)
    assert entries(merged, "generation_config.json")["eos_token_id"] == [3, 1]


def test_a_model_from_no_folder_is_written_as_transformers_writes_it(tmp_path):
    model = scorer()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    FSDPCheckpointManager(model, optimizer, schedule, byte_tokenizer(), torch.float32).save_checkpoint(tmp_path / "c")
    merged = merge(tmp_path / "c", tmp_path / "merged")
    assert entries(merged)["rope_theta"] == 10000.0
    assert load_tokenizer(merged).decode([2, 4]) == byte_tokenizer().decode([2, 4])
