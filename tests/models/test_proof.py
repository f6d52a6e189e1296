"""Families that packing or the head here would leave something out of, one of each kind, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.tiny import SIZES, answer_rows, causal_lm, scorer
from verl.models.answer_models import PolicyModel, ScoreModel
from verl.models.attention import set_attention
from verl.models.layers import recompute_layers
from verl.models.proof import check_class, class_verdict, proof_rows, prove

ENDS = {"pad_token_id": 0, "eos_token_id": 1}
FULL = ["full_attention"] * 2
LONG_AND_SHORT = {"long_factor": [2.0 + k for k in range(4)], "short_factor": [1.0] * 4}


def build(config_class, model_class, seed=0, **entries):
    torch.manual_seed(seed)
    return model_class(config_class(**{**SIZES, **ENDS, **entries}))


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2))


def alone(model, rows):
    """One row at a time, no padding, the class's own logits."""
    result = torch.zeros(rows.responses.shape)
    for row, (prompt, answer) in enumerate(rows.unpadded()):
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0]
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, answer[:, None])[:, 0]
        result[row, : len(answer)] = picked
    return result


@pytest.mark.parametrize(
    "model", [bloom, lambda: build(FalconConfig, FalconForCausalLM, alibi=False)], ids=["bloom", "falcon"]
)
def test_attention_that_does_not_switch_is_refused_and_padding_offered(model):
    name = type(model()).__name__
    with pytest.raises(
        ValueError, match=rf"{name} cannot be used with packed rows.*use_remove_padding=False, which was"
    ):
        PolicyModel(model())
    rows = answer_rows([5, 5, 7], [6, 4, 6])
    padded = PolicyModel(model(), remove_padding=False)(rows)[0]
    torch.testing.assert_close(padded, alone(model().eval(), rows), atol=1e-5, rtol=1e-5)


def gemma2():
    full = {"head_dim": 8, "layer_types": FULL, "final_logit_softcapping": None}
    return build(Gemma2Config, Gemma2ForCausalLM, **full)


def gpt_oss():
    return build(GptOssConfig, GptOssForCausalLM, head_dim=8, layer_types=FULL, num_local_experts=4)


@pytest.mark.parametrize("model", [gemma2, gpt_oss])
def test_caps_and_sinks_are_right_packed_and_padded(model):
    """Padded they are Hugging Face's own, which has no SDPA for them."""
    rows = answer_rows([5, 5, 7], [6, 4, 6])
    expected = alone(model().eval(), rows)
    packed, padded = PolicyModel(model()), PolicyModel(model(), remove_padding=False)
    assert padded.hf.config._attn_implementation == "eager"
    for module in (packed, padded):
        torch.testing.assert_close(module(rows)[0], expected, atol=1e-5, rtol=1e-5)


def test_an_argument_that_changes_attention_is_refused():
    class Biased(Qwen2ForCausalLM):
        """A class whose attention gets something that packed rows have no use for."""

        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].self_attn.register_forward_pre_hook(self.add, with_kwargs=True)

        @staticmethod
        def add(module, inputs, keywords):
            return inputs, {**keywords, "position_bias": torch.zeros(1)}

    with pytest.raises(
        ValueError, match="which leaves out position_bias=Tensor; use use_remove_padding=False, which was"
    ):
        check_class(PolicyModel, Biased, causal_lm().config, True)


def test_layers_that_keep_the_layout_to_themselves_are_refused():
    with pytest.raises(ValueError, match=r"do not pass on to attention where rows begin.*use_remove_padding=False"):
        PolicyModel(build(StableLmConfig, StableLmForCausalLM))


@pytest.mark.parametrize("remove_padding", [True, False])
def test_what_is_wrong_padded_too_is_refused_and_padding_is_no_way_out(remove_padding):
    with pytest.raises(ValueError, match="Doubled cannot be used") as caught:
        check_class(PolicyModel, Doubled, causal_lm().config, remove_padding)
    assert "which was compared and is right" not in str(caught.value)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="depend on tokens that come later"):
        PolicyModel(BertLMHeadModel(BertConfig(**SIZES)), remove_padding=False)


# ---------------------------------------------------------------------------------------------------------------------
# How long rows may be


def long_rope(rope_type: str, **entries):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **entries}
    return {"rope_parameters": rope}


def phi3():
    original = {"original_max_position_embeddings": 16}
    return build(Phi3Config, Phi3ForCausalLM, **original, **long_rope("longrope", **original, **LONG_AND_SHORT))


def dynamic():
    return build(LlamaConfig, LlamaForCausalLM, max_position_embeddings=16, **long_rope("dynamic", factor=4.0))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(phi3, "original_max_position_embeddings=16"), (dynamic, "max_position_embeddings=16")],
    ids=["longrope", "dynamic"],
)
@pytest.mark.parametrize("remove_padding", [True, False])
def test_rows_beyond_the_original_length_are_refused(model, reason, remove_padding):
    """Its angles are chosen for the longest row of a batch: up to the original length, the same for all."""
    module = PolicyModel(model(), remove_padding)
    rows = answer_rows([5, 8], [6, 8])
    expected = alone(model().eval(), rows)
    torch.testing.assert_close(module(rows)[0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=rf"beyond 16 tokens \({reason}\)"):
        module(answer_rows([5, 9], [6, 8]))


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_other_stretched_positions_have_no_such_limit(kind):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    more |= {} if kind == "linear" else {"original_max_position_embeddings": 16}
    model = build(LlamaConfig, LlamaForCausalLM, **long_rope(kind, factor=4.0, **more))
    rows = answer_rows([5, 25], [6, 8])
    expected = alone(build(LlamaConfig, LlamaForCausalLM, **long_rope(kind, factor=4.0, **more)).eval(), rows)
    torch.testing.assert_close(PolicyModel(model)(rows)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_window_within_reach_is_right_before_anything_starts():
    window = {"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["sliding_attention"] * 2}
    config = Qwen2Config(**{**SIZES, **ENDS, **window})
    for remove_padding in (True, False):
        assert check_class(PolicyModel, Qwen2ForCausalLM, config, remove_padding, longest=4097).longest is None


# ---------------------------------------------------------------------------------------------------------------------
# No randomness


def jittery():
    return build(PhimoeConfig, PhimoeForCausalLM, num_local_experts=4, sliding_window=None, router_jitter_noise=0.2)


def layer_dropping():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": 260, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.2}
    return OPTForCausalLM(OPTConfig(**sizes, **ENDS, layerdrop=0.5, dropout=0.3, attention_dropout=0.3))


@pytest.mark.parametrize("model", [jittery, layer_dropping], ids=["router jitter", "dropped layers"])
def test_a_model_in_training_mode_computes_one_function(model):
    hf = model()
    rows = answer_rows([9] * 8, [20] * 8)
    expected = alone(hf.eval(), rows)
    module = PolicyModel(hf).train()
    assert module.training and not any(child.training for child in hf.modules())
    first, second = module(rows)[0], module(rows)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_of_a_model_with_recomputed_layers_only_these_are_in_training_mode():
    hf = jittery()
    recompute_layers(hf, 0.5)
    module = PolicyModel(hf)
    names = {name for name, child in module.train().named_modules() if child.training}
    assert names == {"", "hf.model.layers.0"}
    assert not any(child.training for child in module.eval().modules())
    rows = answer_rows([9] * 4, [20] * 4)
    module.train()
    gradients = []
    for _ in range(2):
        module.zero_grad()
        module(rows)[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    plain = PolicyModel(jittery())
    plain(rows)[0].sum().backward()
    for first, second, expected in zip(*gradients, [p.grad for p in plain.parameters()], strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# On a model's own weights


def test_models_that_are_right_pass_in_every_type():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    for model in (causal_lm(), causal_lm("qwen3"), build(Qwen3MoeConfig, Qwen3MoeForCausalLM, **moe)):
        for dtype in (torch.float32, torch.bfloat16):
            for remove_padding in (True, False):
                prove(PolicyModel(model.to(dtype), remove_padding), dtype)
    prove(ScoreModel(scorer()), torch.float32)
    prove(ScoreModel(scorer().bfloat16()), torch.bfloat16)


class Doubled(Qwen2ForCausalLM):
    """A class whose logits are not its head's."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_wrong_is_found_on_its_own_weights(dtype):
    torch.manual_seed(0)
    model = Doubled(causal_lm().config).to(dtype)
    with pytest.raises(ValueError, match="Doubled cannot be used with packed rows: its values differ"):
        prove(PolicyModel(model, proven=True), dtype)
    with pytest.raises(ValueError, match="Doubled cannot be used"):
        check_class(PolicyModel, Doubled, causal_lm().config, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_each_other_are_found_on_a_models_own_weights(dtype, monkeypatch):
    """One causal triangle over all packed tokens; padding is right, and is offered because it was compared."""
    from verl.models import attention

    def over_all(query, key, value, *_):
        states = [part.transpose(0, 1)[None] for part in (query, key, value)]
        output = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1)

    model = PolicyModel(causal_lm().to(dtype))
    monkeypatch.setattr(attention, "_on_grid", over_all)
    with pytest.raises(ValueError, match=r"beside each other change.*use_remove_padding=False, which was"):
        prove(model, dtype)
    assert model.remove_padding and model.hf.config._attn_implementation == attention.PACKED_ATTENTION


def test_the_rows_of_the_proof():
    """Eleven, nine and six tokens, none of them special; the first two rows have one prompt."""
    config = causal_lm().config
    rows = proof_rows(config)
    assert rows.lengths() == [11, 9, 6]
    assert rows.begins_family().tolist() == [True, False, True]
    tokens = torch.cat([torch.cat(parts) for parts in rows.unpadded()])
    assert tokens.min() > 1 and tokens.max() < config.vocab_size and len(set(tokens.tolist())) == 21
    longer = proof_rows(config, longest=40)
    assert longer.lengths() == [40, 9, 6] and longer.begins_family().all()


def test_a_config_that_cannot_be_made_small_is_not_refused():
    """Its window is the limit that is known of it."""
    config = causal_lm().config
    config.sliding_window = 64

    class Odd(Qwen2ForCausalLM):
        def __init__(self, config):
            if config.hidden_size != 32 or config.vocab_size != 260 or config.sliding_window != 64:
                raise ValueError("these sizes are not mine")
            super().__init__(config)

        def forward(self, *args, **kwargs):
            if torch.is_inference_mode_enabled():
                return super().forward(*args, **kwargs)
            raise ValueError("not now")

    verdict = class_verdict(PolicyModel, Odd, config, True)
    assert (verdict.fault, verdict.longest, verdict.compared) == (None, 64, False)
    assert class_verdict(PolicyModel, Odd, config, False).longest is None


def test_switching_attention_where_a_class_cannot_is_an_error():
    with pytest.raises(ValueError, match="does not get its attention from transformers' AttentionInterface"):
        set_attention(bloom(), "sdpa")
    assert AutoModelForCausalLM._model_mapping[BloomConfig] is BloomForCausalLM
