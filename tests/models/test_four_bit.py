"""Weights in 4 bits: the values that the paper's levels stand for, and layers and models that compute with them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.adapters import adapter_config, train_a_little, with_peft, write_peft_folder
from tests.tiny import VOCAB, answer_rows, byte_tokenizer, causal_lm, scorer, write_model
from verl.models.adapter_folders import find_adapter
from verl.models.adapters import add_adapters, put_base_in_4bit
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.four_bit import (
    Linear4bit,
    put_in_4bit,
    quantization_json,
    require_bitsandbytes,
    round_to_4bit,
    whole_weight,
)
from verl.models.layers import compile_layers
from verl.models.loading import load_model
from verl.models.proof import prove
from verl.models.sharding import full_parameters

IDS = torch.arange(2, 26).view(2, 12)
# NormalFloat's 16 values as the paper lists them (arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def rounded(model, dtype: torch.dtype = torch.float32):
    round_to_4bit(model, dtype)
    return model


def in_4bit(model, kind: str = "lora", train: bool = True):
    """With adapters beside it, as after training."""
    add_adapters(model, adapter_config(kind))
    put_base_in_4bit(model, torch.float32, values=True)
    if train:
        train_a_little(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 64), (5, 30), (3, 7)])
def test_a_weight_becomes_the_nearest_levels_of_its_blocks(shape, dtype):
    """Blocks of 64 numbers, row after row, the last one shorter: the largest absolute value times the nearest level."""
    plain = torch.nn.Linear(shape[1], shape[0], bias=False)
    numbers = plain.weight.detach().flatten()
    levels, expected = torch.tensor(NF4), []
    for block in numbers.split(64):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - levels).abs().argmin(dim=1)
        expected.append(largest * levels[nearest])
    layer = Linear4bit(plain, dtype, values=True)
    assert not layer.weight_4bit.requires_grad
    torch.testing.assert_close(layer.weight, torch.cat(expected).view(shape), atol=1e-7, rtol=1e-6)
    assert torch.equal(whole_weight(layer), layer.weight.to(dtype))
    # 4.5 bits a number and what fills up 16 bytes.
    blocks = -(-numbers.numel() // 64)
    assert 0 <= layer.weight_4bit.nbytes - (4 * blocks + -(-numbers.numel() // 2)) < 16
    largest = layer.weight_4bit[-4 * blocks :].view(torch.float32)
    torch.testing.assert_close(largest, torch.stack([block.abs().max() for block in numbers.split(64)]))
    assert (layer.weight_4bit.nbytes - 4 * blocks) % 16 == 0


def test_a_layer_computes_with_that_weight_forward_and_backward():
    plain = torch.nn.Linear(48, 20)
    layer = Linear4bit(plain, torch.float32, values=True)
    inputs = torch.randn(2, 3, 48, requires_grad=True)
    found = layer(inputs)
    expected = torch.nn.functional.linear(inputs, layer.weight, plain.bias)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(found.shape)
    torch.testing.assert_close(*(torch.autograd.grad((y * slope).sum(), inputs)[0] for y in (found, expected)))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "some"])
def test_logits_are_those_of_peft_on_the_rounded_model(kind):
    """With adapters, and merged for the engine. The heads and embeddings stay as they are."""
    model = in_4bit(causal_lm(), kind)
    expected = logits(with_peft(rounded(causal_lm()), kind))
    assert (expected - logits(with_peft(causal_lm(), kind))).abs().max() > 0.01, "4 bits change nothing"
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-5)
    engine = causal_lm(seed=9)
    pushed = dict(full_parameters(model))
    assert pushed.keys() == dict(engine.named_parameters()).keys()
    engine.load_state_dict(pushed, strict=False)
    torch.testing.assert_close(logits(engine), expected, atol=1e-4, rtol=1e-5)
    whole = dict(causal_lm().named_parameters())
    assert all(("_proj." in name) or torch.equal(tensor, whole[name]) for name, tensor in pushed.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fresh_adapters_change_nothing(kind):
    torch.testing.assert_close(logits(in_4bit(causal_lm(), kind, train=False)), logits(rounded(causal_lm())))


@pytest.mark.parametrize("remove_padding", [True, False])
def test_packed_rows_are_proved(remove_padding):
    model = PolicyModel(in_4bit(causal_lm()), remove_padding)
    prove(model.eval(), torch.float32)
    rows = answer_rows([5, 5, 2], [6, 4, 4])
    rows.prompts[1] = rows.prompts[0]
    with torch.no_grad():
        torch.testing.assert_close(model.values(rows), model.plain(rows), atol=1e-4, rtol=1e-5)
    prove(ScoreModel(in_4bit(scorer()), remove_padding).eval(), torch.float32)


def test_compiled_layers_compute_the_same():
    plain, compiled = in_4bit(causal_lm()).train(), in_4bit(causal_lm()).train()
    compile_layers(compiled)
    for model in (plain, compiled):
        model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in compiled.named_parameters() if p.grad is not None}
    assert expected and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_models_without_such_layers_are_refused():
    """GPT-2's layers hold their weights the other way round."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(ValueError, match="load_in_4bit: GPT2LMHeadModel has no linear layers within its decoder"):
        put_in_4bit(model, torch.float32)


def test_what_is_written_is_transformers_own_and_another_way_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    assert find_adapter(tmp_path).base_dtype is None and not find_adapter(tmp_path).base_in_4bit
    file = tmp_path / "base_quantization.json"
    file.write_text(quantization_json(torch.bfloat16))
    assert find_adapter(tmp_path).base_dtype == "bfloat16" and find_adapter(tmp_path).base_in_4bit
    theirs = BitsAndBytesConfig.from_dict(json.loads(file.read_text()))
    assert theirs.load_in_4bit and theirs.bnb_4bit_quant_type == "nf4" and not theirs.bnb_4bit_use_double_quant
    assert theirs.bnb_4bit_compute_dtype == torch.bfloat16
    file.write_text(file.read_text().replace("nf4", "fp4"))
    with pytest.raises(ValueError, match=r"base_quantization\.json: expected .*'nf4'.*, got .*'fp4'"):
        find_adapter(tmp_path).base_in_4bit  # noqa: B018
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"base_quantization\.json is damaged: expected bnb_4bit_compute_dtype"):
        find_adapter(tmp_path).base_in_4bit  # noqa: B018


@pytest.mark.parametrize("packed", [False, True])
def test_a_merged_folder_is_loaded_in_the_types_of_its_base(tmp_path, packed):
    """In bf16: routers, which transformers keeps in fp32, and tables of positions apart."""
    config = Glm4MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    hf = Glm4MoeForCausalLM(config)
    hf.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write_peft_folder(tmp_path / "adapter", tmp_path / "base", hf, target_modules=["q_proj", "v_proj"])
    if packed:
        (tmp_path / "adapter" / "base_quantization.json").write_text(quantization_json(torch.bfloat16))
    base, merged = (load_model(tmp_path / name, "policy", dtype=torch.bfloat16) for name in ("base", "adapter"))
    expected, found = (
        {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        for model in (base, merged)
    )
    assert {torch.float32, torch.bfloat16} <= set(expected.values()) and found == expected


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr("verl.models.four_bit.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"x needs the bitsandbytes library.*pip install 'verl\[qlora\]'"):
        require_bitsandbytes("x")


def test_the_rounded_model_is_what_transformers_loads_in_4_bits(tmp_path):
    write_model(tmp_path / "base")
    theirs = BitsAndBytesConfig.from_dict(json.loads(quantization_json(torch.float32)))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=theirs, dtype=torch.float32)
    # Without dropout it computes the same in training, where the library does not pack its layers anew for the CPU.
    with torch.no_grad():
        found = loaded.train()(input_ids=IDS).logits
    assert (found - logits(causal_lm())).abs().max() > 0.01, "nothing is in 4 bits"
    torch.testing.assert_close(found, logits(rounded(causal_lm())), atol=1e-4, rtol=1e-5)
