"""A discriminator of another family than `tests.tiny`'s student: another tokenizer, template and class."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tiny import SIZES

TEXTS = ["It is 3. It is 4. What is it?", "天空是什么颜色? 红的。红色的苹果是什么颜色?", "<user> <bot> one is one"]
END = "</s>"
TEMPLATE = (
    "{{ '<s>' }}{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}"
    "{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def other_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges learned from a few texts; <s>, </s> and <pad> have other numbers and names than the
    student's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", END, "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=END, pad_token="<pad>", chat_template=template
    )


def _save(model, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_other_model(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **sizes: int) -> Path:
    """A random Llama, and the tokenizer."""
    torch.manual_seed(5)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return _save(
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 330, **ids, **sizes})),
        folder,
        tokenizer or other_tokenizer(),
    )


def write_reward_model(folder: Path) -> Path:
    """A random GPT-2 with a sequence-classification head of one label, whose name is not that of a discriminator's."""
    torch.manual_seed(6)
    sizes = {"vocab_size": 330, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = GPT2Config(**sizes, **ids, num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _save(GPT2ForSequenceClassification(config), folder, other_tokenizer())
