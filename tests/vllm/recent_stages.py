"""A family's small model through SeqKD, warmup and GAD, answers by vLLM; run as a program of its own, an engine to a
process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.e2e.running import read_metrics, train
from tests.recent_families import recent
from tests.tiny import byte_tokenizer, write_data
from verl.trainer.in_process import run_in_process

# Sizes that the kernels of GPUs take, in all else as tiny.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.05, **HEADS}
HEAD_DIM = {family: {"head_dim": 64} for family in ("gemma2", "gemma3", "gpt_oss", "qwen3_next", "qwen3_5")}
GEMMA = {
    "gemma2": {"query_pre_attn_scalar": 64, "final_logit_softcapping": 15.0},
    "gemma3": {"query_pre_attn_scalar": 64},
}
LINEAR = {family: {f"linear_{of}_head_dim": 128 for of in ("key", "value")} for family in ("qwen3_next", "qwen3_5")}
EXPERTS = {"qwen3_next": {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}}


def write_base(family: str, folder: Path) -> None:
    """A model that is sure of some tokens: other weights would give other probabilities by tenths."""
    sizes = {key: value for part in (HEAD_DIM, GEMMA, LINEAR, EXPERTS) for key, value in part.get(family, {}).items()}
    model = recent(family, **SIZES, **sizes)
    with torch.no_grad():
        # A tied embedding of Gemma's, multiplied by its size as it comes in, soon knows nothing but the token it is of.
        model.get_output_embeddings().weight.mul_(1.5 if model.config.tie_word_embeddings else 4)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main(folder: Path, family: str, device: str, dtype: str) -> None:
    """Writes the metrics of the steps to folder/steps.json: of three the first is the discriminator's alone."""
    write_base(family, folder / "base")
    write_data(folder / "train.jsonl", rows=12)
    write_data(folder / "val.jsonl", rows=2)
    short = (f"trainer.device={device}", "trainer.test_freq=-1", "trainer.val_before_train=False")
    short += tuple(f"{model}.fsdp_config.dtype={dtype}" for model in ("actor_rollout_ref.actor", "critic.model"))
    short += ("actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",)
    seqkd = ("stage=seqkd", "trainer.sft_monitor_freq=-1", "trainer.total_training_steps=1")
    trained = train(folder, "seqkd", *short, *seqkd, run_with=run_in_process)
    actor = trained / "global_step_1" / "actor"
    models = (f"actor_rollout_ref.model.path={actor}", f"critic.model.path={actor}")
    engine = ("name=vllm", "enforce_eager=True", "gpu_memory_utilization=0.1", f"dtype={dtype}")
    engine = tuple(f"actor_rollout_ref.rollout.{setting}" for setting in engine)
    gad = ("stage=warmup", "trainer.critic_warmup=1", "trainer.total_training_steps=3", "critic.optim.lr=1e-4")
    run = train(folder, "gad", *short, *models, *engine, *gad, "critic.balance.enable=False", run_with=run_in_process)
    (folder / "steps.json").write_text(json.dumps(read_metrics(run)))


def gaps(folder: Path) -> list[float]:
    """The mean gap between the engine's probabilities and the trainer's at each step, where both models are trained."""
    steps = json.loads((folder / "steps.json").read_text())
    assert [step["critic/grad_norm"] > 0 for step in steps.values()] == [True] * 3
    assert [step["actor/grad_norm"] > 0 for step in list(steps.values())[1:]] == [True] * 2
    return [step["training/rollout_probs_diff_mean"] for step in steps.values()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
