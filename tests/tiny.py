"""Tiny models, tokenizers and data that tests make for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from verl.models.packing import AnswerRows

VOCAB = 260
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that different inputs give clearly different outputs.
    "initializer_range": 0.2,
}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def causal_lm(family: str = "qwen2", seed: int = 0, tied: bool = True) -> PreTrainedModel:
    """A random language model of the given family, in fp32."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**SIZES, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1, **extra))


def scorer(seed: int = 1) -> PreTrainedModel:
    """A random discriminator: Qwen2 with one label and no dropout."""
    torch.manual_seed(seed)
    config = Qwen2Config(**SIZES, pad_token_id=0, eos_token_id=1, num_labels=1, classifier_dropout=0.0)
    return Qwen2ForTokenClassification(config)


def answer_rows(prompt_lengths: list[int], answer_lengths: list[int], prompt_width: int = 0, answer_width: int = 0):
    """Random rows of the given lengths, prompts left-padded and answers right-padded with 0."""
    prompt_width = prompt_width or max(prompt_lengths)
    answer_width = answer_width or max(answer_lengths)
    generator = torch.Generator().manual_seed(sum(prompt_lengths) + 7 * sum(answer_lengths))
    count = len(prompt_lengths)
    prompts = torch.randint(2, VOCAB, (count, prompt_width), generator=generator)
    answers = torch.randint(2, VOCAB, (count, answer_width), generator=generator)
    prompt_mask = (torch.arange(prompt_width) >= prompt_width - torch.tensor(prompt_lengths)[:, None]).long()
    answer_mask = (torch.arange(answer_width) < torch.tensor(answer_lengths)[:, None]).long()
    return AnswerRows(prompts * prompt_mask, prompt_mask, answers * answer_mask, answer_mask)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that any text survives, with a chat template; pad 0, eos 1."""
    vocab = {"<pad>": 0, "<eos>": 1, "<user>": 2, "<bot>": 3}
    vocab |= {byte: len(vocab) + number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<bot>' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>"],
        chat_template=template,
    )


def write_model(folder: Path, seed: int = 0) -> Path:
    """A model folder: random Qwen2 and the byte tokenizer."""
    causal_lm(seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_data(path: Path, rows: int = 24) -> Path:
    """A jsonl file of short questions in two languages with their answers."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            question, answer = (f"a{row}?", f"It is {row % 7}.") if row % 2 else (f"{row}是什么颜色?", "红的")
            content = [{"role": "user", "content": question}]
            file.write(json.dumps({"content": content, "teacher_response": answer}, ensure_ascii=False) + "\n")
    return path
