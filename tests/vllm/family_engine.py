"""A family's tiny model in vLLM and in this process beside it; run as a program of its own, an engine to a process."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny import byte_tokenizer
from tests.vllm.tiny_engine import CONFIG, EOS, GREEDY, LIMIT, PROMPT, greedy_answers, prompts, real_tokens
from tests.workers.updates_setup import settings
from verl.batch import student_rows
from verl.models.answer_models import PolicyModel
from verl.models.sharding import full_parameters
from verl.workers.rollout import get_rollout_class

LENGTHS = [3, 50, 1, 9, 100, 2]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Routed with a bias that is no parameter. What vLLM asks of a config besides is in those of real checkpoints.
BIASED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32}
FAMILIES = {
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig,
                  {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "head_dim": 32}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, {**BIASED, "head_dim": 32}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config,
                    {**BIASED, **LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    """Random weights; router biases that send tokens elsewhere."""
    model_class, config_class, entries = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**CONFIG, **entries)).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0, 1, buffer.numel()))
    return model


def pushed(family: str) -> list:
    """After each of two pushes: how many rows are answered as the model itself would answer them, the largest
    difference of the answers' log-probs, and the answers."""
    model = build(family)
    rollout = dataclasses.replace(
        settings("gspo").actor_rollout_ref.rollout, name="vllm", prompt_length=PROMPT, response_length=LIMIT,
        dtype="float32", enforce_eager=True, gpu_memory_utilization=0.15,
    )  # fmt: skip
    engine = get_rollout_class("vllm")(model.config, byte_tokenizer(), rollout, "cpu")
    results = []
    for _ in range(2):
        engine.push_weights(full_parameters(model))
        data = prompts(LENGTHS)
        answered = engine.generate(data, GREEDY, seed=0, report_log_probs=len(LENGTHS))
        got, expected = real_tokens(answered), greedy_answers(model, data)
        data.union(answered)
        log_probs, _ = PolicyModel(copy.deepcopy(model))(student_rows(data), temperature=1.0)
        difference = (answered.batch["rollout_log_probs"].flatten(0, 1) - log_probs).abs().max().item()
        results.append((sum(a == b for a, b in zip(got, expected, strict=True)), difference, got))
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return results


def loaded(family: str) -> list[list[int]]:
    """The answers of an engine that has read the model from a folder, as vLLM does by itself."""
    from vllm import LLM, SamplingParams

    import verl.workers.rollout.vllm_rollout  # noqa: F401, the environment that vLLM reads

    with tempfile.TemporaryDirectory() as folder:
        build(family).save_pretrained(folder)
        engine = LLM(
            model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.15,
            max_model_len=PROMPT + LIMIT, distributed_executor_backend="external_launcher",
        )  # fmt: skip
        data = prompts(LENGTHS).batch
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(data["input_ids"], data["attention_mask"], strict=True)]
        greedy = SamplingParams(
            temperature=0, max_tokens=LIMIT, ignore_eos=True, stop_token_ids=[EOS], detokenize=False
        )
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    print("\n" + json.dumps({"pushed": pushed, "loaded": loaded}[sys.argv[1]](sys.argv[2])))
