"""Whole runs with models that keep something in another place than most: what is trained is saved, pushed, merged."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
)

from tests.tiny import SIZES, byte_tokenizer, causal_lm, write_data
from tests.workers.updates_setup import settings
from verl.model_merger import merge
from verl.model_merger.merger import compare
from verl.models.loading import check_labels, load_config, load_model
from verl.models.sharding import full_parameters
from verl.tools.score.__main__ import main as score
from verl.trainer.config import compose_config
from verl.trainer.in_process import run_in_process
from verl.utils.checkpoint.fsdp_checkpoint_manager import tied_names
from verl.workers.rollout.hf_rollout import HFRollout

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
GPT2_SIZES = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def biogpt():
    return BioGptForCausalLM(BioGptConfig(**SIZES, **ENDS))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **ENDS))


def olmo2():
    return Olmo2ForCausalLM(Olmo2Config(**SIZES, **ENDS))


def deepseek():
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    }
    sizes = {**SIZES, "num_key_value_heads": 4}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **experts, **ENDS, first_k_dense_replace=1))
    # Drawn to the fourth expert above all: a router that forgets this goes other ways.
    model.get_buffer(BIAS).copy_(torch.arange(4.0))
    return model


def write(folder, model):
    torch.manual_seed(0)
    model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(tmp_path, stage, *overrides):
    run_in_process(
        compose_config(
            [
                f"stage={stage}", "trainer.device=cpu", f"data.train_files={write_data(tmp_path / 'train.jsonl')}",
                "data.train_batch_size=4", "data.max_prompt_length=40", "data.max_response_length=12",
                f"actor_rollout_ref.model.path={tmp_path}/base", "actor_rollout_ref.rollout.n=2",
                "trainer.experiment_name=x", f"trainer.default_local_dir={tmp_path}/run", "trainer.logger=[file]",
                "trainer.sft_monitor_freq=-1", "trainer.total_training_steps=2", *overrides,
            ]
        )
    )  # fmt: skip
    return [json.loads(line)["data"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", [biogpt, deepseek, gpt2])
def test_a_student_is_saved_and_merged_whole(tmp_path, model):
    """With a head tied under another name, with a router's bias in a buffer, and with both in the usual place."""
    write(tmp_path / "base", model)
    train(tmp_path, "seqkd")
    actor = tmp_path / "run" / "global_step_2" / "actor"
    merged = merge(actor, tmp_path / "merged")
    assert compare(actor, merged) > 10
    trained = load_model(merged, "policy")
    base = load_model(tmp_path / "base", "policy")
    assert trained.state_dict().keys() == base.state_dict().keys()
    if model is deepseek:
        assert trained.get_buffer(BIAS).tolist() == [0, 1, 2, 3]
    if model is biogpt:
        assert tied_names(trained) == {"output_projection.weight"}
        assert trained.output_projection.weight is trained.biogpt.embed_tokens.weight


@pytest.mark.parametrize("model", [gpt2, olmo2])
def test_a_discriminator_with_a_head_of_another_name_or_of_ours_is_trained_and_scores(tmp_path, model):
    """GPT-2's head is called `classifier`; OLMo 2 has no token-classification class in transformers."""
    write(tmp_path / "base", model)
    metrics = train(tmp_path, "warmup", f"critic.model.path={tmp_path}/base")
    assert "critic/d_loss" in metrics[-1]
    critic = tmp_path / "run" / "global_step_2" / "critic"
    merge(critic, tmp_path / "merged")
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"content": "a?", "teacher_response": "It is 3.", "student_response": "red"}) + "\n"
    )
    scored = []
    for number, folder in enumerate((critic, tmp_path / "merged")):
        out = tmp_path / f"scores_{number}.jsonl"
        score(["--critic", str(folder), "--data", str(tmp_path / "answers.jsonl"), "--out", str(out)])
        scored.append(json.loads(out.read_text())["score_diff"])
    assert scored[0] == pytest.approx(scored[1], abs=1e-5)


def test_an_engine_gets_buffers(tmp_path):
    model = deepseek().eval()
    rollout = dataclasses.replace(settings("gspo").actor_rollout_ref.rollout)
    engine = HFRollout(model.config, byte_tokenizer(), rollout, "cpu")
    engine.push_weights(full_parameters(model))
    assert engine.model.get_buffer(BIAS).tolist() == [0, 1, 2, 3]
    ids = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(engine.model(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=f"1 weights were not pushed, e.g. \\['{BIAS}'\\]"):
        engine.push_weights((name, tensor) for name, tensor in full_parameters(model) if name != BIAS)


def untied_in_secret(folder):
    """A head of its own under a config that says that it is the embedding."""
    write(folder, lambda: causal_lm(tied=False))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    return folder


def test_a_head_that_the_config_denies_is_refused_and_kept_with_the_override(tmp_path):
    untied_in_secret(tmp_path / "base")
    with pytest.raises(ValueError, match=r"set override_config\.tie_word_embeddings=False"):
        load_model(tmp_path / "base", "policy")
    with pytest.raises(ValueError, match=r"set override_config\.tie_word_embeddings=False"):
        train(tmp_path, "seqkd")
    key = "+actor_rollout_ref.model.override_config.tie_word_embeddings=False"
    train(tmp_path, "seqkd", key, "actor_rollout_ref.actor.optim.lr=0")
    merged = load_model(merge(tmp_path / "run" / "global_step_2" / "actor", tmp_path / "merged"), "policy")
    assert not merged.config.tie_word_embeddings
    expected = causal_lm(tied=False)
    assert torch.equal(merged.lm_head.weight, expected.lm_head.weight)


def test_rows_beyond_the_context_are_refused(tmp_path):
    write(tmp_path / "base", causal_lm)
    with pytest.raises(ValueError, match="max_response_length = 257 is above max_position_embeddings=256"):
        train(tmp_path, "seqkd", "data.max_prompt_length=245")
    write(
        tmp_path / "critic", lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "max_position_embeddings": 50}, **ENDS))
    )
    with pytest.raises(ValueError, match=r"critic\.model\.path=.*= 52 is above max_position_embeddings=50"):
        train(tmp_path, "warmup", f"critic.model.path={tmp_path}/critic")


@pytest.mark.parametrize("special", [True, False])
def test_tokens_without_an_embedding_are_refused(tmp_path, special):
    write(tmp_path / "base", lambda: causal_lm())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x1>", "<x2>"])
    if special:
        tokenizer.pad_token = "<x1>"
    tokenizer.save_pretrained(tmp_path / "base")
    problem = "the tokenizer's pad_token '<x1>' has number 260, and the model's embedding .* has 260 rows"
    if not special:
        # Tokens that no row has do no harm.
        train(tmp_path, "seqkd", "trainer.total_training_steps=1")
        problem = r"token '<x2>', in row 5 of the data, has number 261, .* has 260 rows"
        chat = [{"role": "user", "content": "q"}]
        rows = [{"content": chat, "teacher_response": "<x2> ok" if row == 5 else "ok"} for row in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=problem):
        train(
            tmp_path,
            "seqkd",
            *(
                []
                if special
                else [f"data.train_files={tmp_path}/rows.jsonl", f"trainer.default_local_dir={tmp_path}/b"]
            ),
        )


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_with_several_labels_is_refused(tmp_path, labels):
    config = Qwen2Config(**SIZES, **ENDS, num_labels=labels)
    write(tmp_path / "critic", lambda: Qwen2ForTokenClassification(config))
    with pytest.raises(ValueError, match=f"one label, got {labels} labels"):
        check_labels(tmp_path / "critic")
    with pytest.raises(ValueError, match=f"one label, got {labels} labels"):
        load_model(tmp_path / "critic", "score")


@pytest.mark.parametrize("listed", [True, False])
def test_a_window_is_switched_off_by_an_override(tmp_path, listed):
    """Also where the file lists the kinds of layers that follow from it."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    write(tmp_path, lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **ENDS, **window)))
    if not listed:
        entries = json.loads((tmp_path / "config.json").read_text())
        entries.pop("layer_types")
        (tmp_path / "config.json").write_text(json.dumps(entries))
    assert load_config(tmp_path, "policy").layer_types == ["full_attention", "sliding_attention"]
    changed = load_config(tmp_path, "policy", {"use_sliding_window": False})
    assert changed.layer_types == ["full_attention"] * 2 and changed.sliding_window is None


def test_an_engine_takes_a_model_that_has_no_sdpa(tmp_path):
    """gpt-oss has sinks, which SDPA does not know: padded rows and the engine use its eager attention."""
    sizes = {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    write(tmp_path / "base", lambda: GptOssForCausalLM(GptOssConfig(**sizes, **ENDS)))
    padded = "actor_rollout_ref.model.use_remove_padding=False"
    metrics = train(tmp_path, "seqkd", padded, "data.val_files=${data.train_files}", "trainer.total_training_steps=1")
    assert metrics
