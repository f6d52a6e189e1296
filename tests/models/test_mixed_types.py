"""Families that keep some weights in fp32, or freeze some: sharded, they are trained and asked like any other."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.tiny import VOCAB, answer_rows, byte_tokenizer, write_model
from tests.workers.updates_setup import settings
from verl.models import sharding
from verl.models.answer_models import PolicyModel
from verl.models.loading import load_model
from verl.models.sharding import build_sharded_model

ROWS = answer_rows([5, 3], [4, 2])
GROUP = settings("gspo").actor_rollout_ref


def test_a_reference_in_bf16_whose_router_stays_in_fp32(one_rank, tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    latent = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, **heads, **latent, **experts, first_k_dense_replace=1)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plain = PolicyModel(load_model(tmp_path, "policy", dtype=torch.bfloat16))
    types = {parameter.dtype for parameter in plain.parameters()}
    assert types == {torch.bfloat16, torch.float32}, "the family does not keep any weight in fp32 any more"
    fsdp = replace(GROUP.actor.fsdp_config, dtype="bfloat16")
    model = replace(GROUP.model, path=str(tmp_path))
    with torch.no_grad():
        values = build_sharded_model(model, "policy", fsdp, "cpu", frozen=True).values(ROWS)
        expected = plain.values(ROWS)
    # bf16's rounding: log-probs of a vocabulary of some hundred are around 5.
    torch.testing.assert_close(values.float(), expected.float(), atol=0.1, rtol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_class_freezes_is_the_same_on_every_rank(one_rank, tmp_path, monkeypatch, frozen):
    """As ranks have it that build the structure and read no values: there a class's own choice stands."""
    read = sharding._read

    def as_built(*args):
        hf = read(*args)
        next(hf.parameters()).requires_grad_(False)
        return hf

    monkeypatch.setattr(sharding, "_read", as_built)
    model = replace(GROUP.model, path=str(write_model(tmp_path / "model")))
    module = build_sharded_model(model, "policy", GROUP.actor.fsdp_config, "cpu", frozen=frozen)
    assert {parameter.requires_grad for parameter in module.parameters()} == {True}
