"""A tiny model that vLLM's CPU build accepts, and an engine for it; imported by child processes too."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

from tests.tiny import SIZES, VOCAB, byte_tokenizer
from tests.workers.updates_setup import settings
from verl.config import SamplingConfig
from verl.protocol import DataProto
from verl.workers.rollout import BaseRollout, get_rollout_class

EOS, PROMPT, LIMIT, TEMPERATURE = 1, 200, 8, 0.7
GREEDY = SamplingConfig(n=1, do_sample=False, temperature=0.0, top_p=1.0, top_k=-1)
# vLLM's attention kernels want heads of at least 32 numbers.
CONFIG = SIZES | {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": EOS,
}


def tiny_model(seed: int = 0, tied: bool = True) -> PreTrainedModel:
    """Random weights in fp32, with EOS likely, so that answers end at different lengths."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG, tie_word_embeddings=tied)).eval().requires_grad_(False)
    head = model.get_output_embeddings().weight
    head[EOS] = head.std() * torch.sign(head.mean(0)) * 3
    return model


def write_tiny_models(folder: Path) -> None:
    """Model folders for GAD: `base`, and a random discriminator, `critic`."""
    scorer = Qwen2ForTokenClassification(Qwen2Config(**CONFIG, num_labels=1, classifier_dropout=0.0))
    for name, model in (("base", tiny_model()), ("critic", scorer)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)


def start_engine(tied: bool = True, **changes) -> BaseRollout:
    """An engine without weights on this rank, in fp32 and eager."""
    options = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.15} | changes
    config = dataclasses.replace(
        settings("gspo").actor_rollout_ref.rollout, name="vllm", prompt_length=PROMPT, response_length=LIMIT, **options
    )
    return get_rollout_class("vllm")(tiny_model(tied=tied).config, byte_tokenizer(), config, "cpu")


@cache
def running_engine(tied: bool) -> BaseRollout:
    """One for all tests of a process, kept to its end: an engine that is collected takes the process group with it."""
    # On CPU the share is of the whole process, so the second engine has to count the first one's in.
    return start_engine(tied, gpu_memory_utilization=0.15 if tied else 0.3)


def sampled(n: int) -> SamplingConfig:
    return SamplingConfig(n=n, do_sample=True, temperature=TEMPERATURE, top_p=1.0, top_k=-1)


def prompts(lengths: list[int]) -> DataProto:
    """Random prompts, left-padded with 0 to a width of `PROMPT`."""
    ids = torch.randint(4, VOCAB, (len(lengths), PROMPT), generator=torch.Generator().manual_seed(sum(lengths)))
    mask = (torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths)[:, None]).long()
    return DataProto.from_dict({"input_ids": ids * mask, "attention_mask": mask})


def greedy_answers(model: PreTrainedModel, data: DataProto) -> list[list[int]]:
    """No cache, no batch: one whole forward per token; EOS included."""
    answers = []
    for ids, mask in zip(data.batch["input_ids"], data.batch["attention_mask"].bool(), strict=True):
        answer = []
        while len(answer) < LIMIT and EOS not in answer:
            sequence = torch.cat([ids[mask], torch.tensor(answer, dtype=torch.long)])
            answer.append(model(sequence[None]).logits[0, -1].argmax().item())
        answers.append(answer)
    return answers


def real_tokens(answered: DataProto) -> list[list[int]]:
    """The answers under their mask, row after row."""
    rows = zip(
        answered.batch["responses"].flatten(0, 1), answered.batch["response_mask"].flatten(0, 1).bool(), strict=True
    )
    return [ids[mask].tolist() for ids, mask in rows]
