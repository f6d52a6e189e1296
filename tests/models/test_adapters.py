"""Adapters in models and folders, against PEFT's own way of putting them there, merging them and reading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from tests.adapters import KINDS, adapted, adapter_config, train_a_little, with_peft, write_peft_folder
from tests.recent_families import recent
from tests.tiny import FAMILIES, VOCAB, answer_rows, causal_lm, scorer, write_model
from verl.config import ModelConfig
from verl.models.adapter_folders import find_adapter, name_in_file, name_in_model
from verl.models.adapters import (
    AsFound,
    adapted_layers,
    adapters_of,
    add_adapters,
    config_in,
    config_json,
    merge_adapters,
    without_adapters,
)
from verl.models.adapters_proof import check_merging
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.finding import check_files, find_model, is_discriminator
from verl.models.loading import load_config, load_model
from verl.models.proof import prove
from verl.models.shape import ModelShape, count_parameters
from verl.models.sharding import full_parameters
from verl.trainer.config import compose_config

IDS = torch.arange(2, 26).view(2, 12)


def model_settings(path: Path, *overrides: str) -> ModelConfig:
    required = ["data.train_files=x", f"actor_rollout_ref.model.path={path}", "trainer.experiment_name=x"]
    overrides = [f"actor_rollout_ref.model.{override}" for override in overrides]
    return compose_config([*required, *overrides]).actor_rollout_ref.model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Logits of a size of about 3, whose rounding differs with the order of sums (seen: 2e-5).
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


# ---- in a model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_and_merged_logits_are_pefts(family, kind):
    """Ours with adapters, ours merged for the engine, ours merged in place, against PEFT with and without merging."""
    peft, model = with_peft(causal_lm(family), kind), adapted(causal_lm(family), kind)
    expected = logits(peft)
    assert (expected - logits(causal_lm(family))).abs().max() > 0.1, "the adapters change nothing"
    assert_close(logits(model), expected)
    engine = causal_lm(family, seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pushed = dict(full_parameters(model))
    assert pushed.keys() == dict(engine.named_parameters()).keys()
    engine.load_state_dict(pushed, strict=False)
    assert_close(logits(engine), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "pushing changes none"
    merge_adapters(model)
    merged = peft.merge_and_unload()
    assert type(model) is type(merged) and not adapted_layers(model)
    assert_close(logits(model), expected)
    for (name, ours), theirs in zip(model.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_merged_weight_is_as_worked_out_by_hand():
    """W = [[3, 0], [0, 1]], A = (1, 2), B = (0, 1)^T, scale 2: W + s B A = [[3, 0], [2, 5]]; DoRA with lengths (6, 29)
    makes rows of these lengths: [[6, 0], [2, 5] * 29 / sqrt(29)]."""
    for kind, row in (("lora", [2.0, 5.0]), ("dora", [2 * 29**0.5, 5 * 29**0.5])):
        model = causal_lm()
        layer = model.model.layers[0].mlp
        layer.down_proj = torch.nn.Linear(2, 2, bias=False)
        config = adapter_config(kind, rank=1, lora_alpha=2, target_modules=["layers.0.mlp.down_proj"])
        layer.down_proj.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        add_adapters(model, config)
        layer.down_proj.lora_A["default"].weight.data = torch.tensor([[1.0, 2.0]])
        layer.down_proj.lora_B["default"].weight.data = torch.tensor([[0.0], [1.0]])
        first = [3.0, 0.0]
        if kind == "dora":
            layer.down_proj.lora_magnitude_vector["default"].weight.data = torch.tensor([6.0, 29.0])
            first = [6.0, 0.0]
        merged = dict(full_parameters(model))["model.layers.0.mlp.down_proj.weight"]
        torch.testing.assert_close(merged, torch.tensor([first, row]))


def test_weights_held_the_other_way_round_are_merged_too():
    """GPT-2 keeps (in, out)."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0)
    for kind in ("lora", "dora"):
        model = GPT2LMHeadModel(config).eval()
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            add_adapters(model, adapter_config(kind))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expected = logits(model)
        merge_adapters(model)
        assert_close(logits(model), expected)


def test_fresh_adapters_change_nothing_and_alone_are_trained():
    model = scorer()
    expected = logits(model)
    add_adapters(model, adapter_config())
    assert torch.equal(logits(model), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"score.weight", "score.bias"}
    assert len(trained) == 2 + 2 * 2 * 7  # A and B, two layers, seven matrices


def test_adapters_are_in_fp32_beside_weights_in_bf16():
    model = causal_lm().to(torch.bfloat16)
    add_adapters(model, adapter_config("dora"))
    kinds = {".lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("remove_padding", [True, False])
def test_packed_rows_with_adapters_are_proved_and_shared_prompts_are_those_of_each_row(kind, remove_padding):
    model = PolicyModel(adapted(causal_lm(), kind), remove_padding)
    prove(model.eval(), torch.float32)
    rows = answer_rows([5, 5, 2], [6, 4, 4])
    rows.prompts[1] = rows.prompts[0]
    assert sum(rows.shared_prompts()), "no prompt is shared: this shows nothing"
    with torch.no_grad():
        assert_close(model.values(rows), model.plain(rows))
    prove(ScoreModel(adapted(scorer(), kind), remove_padding).eval(), torch.float32)


def test_without_adapters_it_is_the_model_as_it_was():
    model = adapted(causal_lm(), "dora")
    adapters = logits(model)
    with without_adapters(model):
        assert torch.equal(logits(model), logits(causal_lm()))
    assert torch.equal(logits(model), adapters)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_as_found_is_the_model_before_training(fresh, kind):
    """Fresh adapters are off; adapters that came with the model stay on, with the values that they came with."""
    model = causal_lm()
    add_adapters(model, adapter_config(kind))
    if not fresh:
        train_a_little(model)
    before, found = logits(model), AsFound(model, fresh)
    train_a_little(model)
    after = logits(model)
    assert not torch.allclose(before, after)
    with found.back():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)


# ---- which layers


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"target_modules": ["q_proj", "w_pack"]},
         "target_modules names w_pack, and Qwen2ForCausalLM has no such layer: expected some of "
         "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear"),
        ({"exclude_modules": ["wo"]}, "exclude_modules names wo"),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' and exclude_modules=None leave no layer"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave no layer of Qwen2ForCausalLM"),
        ({"target_modules": ["lm_head"]}, "lm_head of Qwen2ForCausalLM cannot have an adapter"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens of Qwen2ForCausalLM cannot have an adapter"),
    ],
)  # fmt: skip
def test_layers_that_cannot_have_adapters(entries, said):
    with pytest.raises(ValueError) as error:
        add_adapters(causal_lm(tied=False), adapter_config(**entries))
    assert said in str(error.value)


def test_the_score_head_gets_no_adapter():
    with pytest.raises(ValueError, match="score of Qwen2ForTokenClassification cannot have an adapter"):
        add_adapters(scorer(), adapter_config(target_modules=["score"]))


def test_layers_by_a_regular_expression_and_without_some():
    model = causal_lm()
    add_adapters(model, adapter_config(target_modules=r".*layers\.1\..*_proj", exclude_modules=["v_proj"]))
    names = {name.removeprefix("model.layers.1.") for name in adapted_layers(model)}
    assert names == {f"self_attn.{n}_proj" for n in "qko"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}


class SelfServingMLP(Qwen2MLP):
    """Reads the weight of a layer itself, as fused kernels do."""

    def forward(self, x):
        return linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class SelfServing(Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SelfServingMLP(config)


def test_a_class_that_would_leave_adapters_out_is_refused():
    config = causal_lm().config
    check_merging(Qwen2ForCausalLM, config, adapter_config())
    check_merging(Qwen2ForCausalLM, config, adapter_config("dora"))
    with pytest.raises(ValueError, match="does not compute with the adapters of down_proj what it computes"):
        check_merging(SelfServing, config, adapter_config())
    check_merging(SelfServing, config, adapter_config(exclude_modules=["down_proj"]))


class SelfServingText(Qwen3_5ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = SelfServingMLP(config)


def test_the_text_model_of_a_config_of_pictures_and_text_is_compared_with_its_merged_self():
    """As Qwen3.5 is published."""
    config = Qwen3_5Config(text_config=recent("qwen3_5").config.to_dict())
    with pytest.raises(ValueError, match="SelfServingText does not compute with the adapters of down_proj"):
        check_merging(SelfServingText, config, adapter_config())


# ---- folders


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_is_loaded_merged(base, tmp_path, kind):
    peft = write_peft_folder(tmp_path / "adapter", base, causal_lm(), kind)
    model = load_model(tmp_path / "adapter", "policy")
    assert type(model) is Qwen2ForCausalLM and not adapted_layers(model)
    assert_close(logits(model), logits(peft))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not is_discriminator(tmp_path / "adapter")
    source = find_model(tmp_path / "adapter")
    assert (source.huggingface, source.shards, source.adapter.base) == (base, None, str(base))


def test_the_config_beside_adapters_counts_and_not_their_bases(base, tmp_path):
    """That of a run with `override_config`, on every rank."""
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    entries = json.loads((base / "config.json").read_text())
    entries["rope_parameters"] = {"rope_theta": 100.0, "rope_type": "default"}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(entries))
    changed = causal_lm()
    changed = type(changed)(load_config(tmp_path / "adapter", "policy"))
    changed.load_state_dict(causal_lm().state_dict())
    expected = logits(PeftModel.from_pretrained(changed, tmp_path / "adapter"))
    model = load_model(tmp_path / "adapter", "policy")
    assert model.config.rope_parameters["rope_theta"] == 100
    assert_close(logits(model), expected)
    assert not torch.allclose(expected, logits(PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter")), atol=0.1)


def test_a_language_models_adapters_make_a_discriminator_with_a_fresh_head(base, tmp_path):
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    expected = dict(load_model(tmp_path / "adapter", "policy").model.state_dict())
    model = load_model(tmp_path / "adapter", "score")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items())
    with pytest.raises(ValueError, match="lacks"):
        load_model(tmp_path / "adapter", "score", fresh_head=False)


def test_names_in_files_are_those_in_models_and_back(tmp_path, base):
    peft = write_peft_folder(tmp_path, base, causal_lm(), "dora")
    files = load_file(tmp_path / "adapter_model.safetensors")
    ours = {name: p for name, p in adapted(causal_lm(), "dora").named_parameters() if p.requires_grad}
    assert {name_in_model(name) for name in files} == ours.keys()
    assert {name_in_file(name) for name in ours} == files.keys()
    assert all(torch.equal(files[name_in_file(name)], parameter) for name, parameter in ours.items())
    assert name_in_file("score.weight") == "base_model.model.score.weight"
    assert isinstance(peft, PeftModel)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_written_peft_reads(base, tmp_path, kind):
    """adapter_config.json by `config_json`, tensors by `name_in_file`, read by PEFT alone; and by transformers, which
    (as of 5.24) knows other names of DoRA's lengths than PEFT writes."""
    model = adapted(causal_lm(), kind)
    (tmp_path / "adapter_config.json").write_text(config_json(model, base))
    tensors = {name_in_file(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    if kind == "lora":
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    config = config_in(find_adapter(tmp_path))
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 12, kind == "dora")
    assert config.target_modules == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}


def test_a_relative_base_is_of_the_adapters_folder(base, tmp_path):
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    changed(tmp_path / "adapter", base_model_name_or_path="../base")
    (tmp_path / "base").symlink_to(base)
    assert load_model(tmp_path / "adapter", "policy").config.hidden_size == 32


def test_a_base_of_the_hub_is_named_with_its_commit(base, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    text = config_json(adapted(causal_lm()), tmp_path / "hub" / "models--org--name" / "snapshots" / commit)
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    asked = []
    monkeypatch.setattr("verl.models.adapter_folders.model_folder", lambda name: asked.append(name) or str(base))
    assert find_adapter(tmp_path / "adapter").base == str(base)
    assert asked == [f"org/name@{commit}"]


def changed(folder: Path, **entries) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type=LOHA: expected LORA"),
        ({"bias": "all"}, "bias='all', which is not supported"),
        ({"target_parameters": ["experts.down"]}, r"target_parameters=\['experts.down'\], which is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\], which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"from_the_future": 1}, "from_the_future=1, which is not supported"),
        ({"r": 2}, "do not fit Qwen2ForCausalLM: 28 tensors are of another shape"),
        ({"target_modules": ["q_proj"]}, "do not fit Qwen2ForCausalLM: 24 tensors have no place"),
        ({"use_dora": True}, "do not fit Qwen2ForCausalLM: 14 tensors missing"),
        ({"base_model_name_or_path": "/not/there"}, "the base model of .*, /not/there, is not there: copy it there"),
        ({"base_model_name_or_path": None}, "expected the base model as base_model_name_or_path, got None"),
        ({"base_model_name_or_path": "."}, "which holds adapters itself: expected a whole model"),
    ],
)
def test_folders_whose_adapters_cannot_be_used(base, tmp_path, monkeypatch, entries, said):
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    changed(tmp_path / "adapter", **entries)
    monkeypatch.chdir(tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_model(tmp_path / "adapter", "policy")


def test_folders_that_are_not_whole(base, tmp_path):
    write_peft_folder(tmp_path / "adapter", base, causal_lm())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or cut short"):
        check_files(tmp_path / "adapter")
    file.write_text("version https://git-lfs\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        check_files(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter in safetensors"):
        check_files(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        check_files(tmp_path / "adapter")
    both = write_model(tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        check_files(both)


# ---- settings


def test_settings_make_pefts_config(base):
    chosen = ("lora_rank=8", "lora_alpha=32", "target_modules=[q_proj,v_proj]", "exclude_modules=[o_proj]",
              "use_dora=True", "use_rslora=True")  # fmt: skip
    config = adapters_of(model_settings(base, *chosen), None)
    expected = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], exclude_modules=["o_proj"],
                          use_dora=True, use_rslora=True)  # fmt: skip
    assert config.to_dict() == expected.to_dict() and config.lora_dropout == 0
    assert adapters_of(model_settings(base), None) is None


def test_a_folders_own_rank_counts(base, tmp_path):
    write_peft_folder(tmp_path, base, causal_lm())
    folder = find_adapter(tmp_path)
    for chosen in ((), ("lora_rank=4", "lora_alpha=12")):
        assert adapters_of(model_settings(tmp_path, *chosen), folder).r == 4
    said = r"of other settings than model says \(lora_rank=8, not 4; lora_alpha=16, not 12; use_dora=True, not False\)"
    with pytest.raises(ValueError, match=said):
        adapters_of(model_settings(tmp_path, "lora_rank=8", "use_dora=True"), folder)


def test_without_peft_it_is_said(base, tmp_path, monkeypatch):
    write_peft_folder(tmp_path, base, causal_lm())
    monkeypatch.setattr("verl.models.adapters.find_spec", lambda name: None)
    for settings, folder in (
        (model_settings(base, "lora_rank=8"), None),
        (model_settings(tmp_path), find_adapter(tmp_path)),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"needs the peft library, .* pip install 'verl\[lora\]'"):
            adapters_of(settings, folder)


def test_parameters_are_counted_as_by_hand():
    """Rank 4 of hidden 32, intermediate 64, 16 keys and values: 4 (in + out) of each matrix, and the head."""
    layer = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    config = scorer().config
    whole = sum(parameter.numel() for parameter in scorer().parameters())
    assert count_parameters(config, "score", adapters=adapter_config()) == 2 * layer + 32 + 1
    shape = ModelShape.of(config, "score", adapters=adapter_config())
    assert (shape.trained, shape.frozen) == (2 * layer + 33, whole - 33)
    assert shape.parameters == whole + 2 * layer and ModelShape.of(config, "score").frozen == 0
